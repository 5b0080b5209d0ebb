"""Bundles that ship NF4 and run int8: what the device expands is the int8 export's, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from tests import exported, tiny, tiny_encoder
from tests.unit.device.runtime.test_projections import rewrite
from vera_edge import merging as merge
from vera_edge.bundle import contents as bundle
from vera_edge.device.deploy.install import install
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.errors import BundleError, PlanError, VeraEdgeError
from vera_edge.exporting import target
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder

SOURCE, FILE = "model.4bit.safetensors", "onnx/model.onnx_data_1"


@pytest.fixture(scope="module")
def shipped(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch beside the untouched NF4 base."""
    out = tmp_path_factory.mktemp("shipped") / "out"
    options = {"run": "int8"}
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="nf4", options=options)
    return out


@pytest.fixture(scope="module")
def installed(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(shipped, tmp_path_factory.mktemp("device")).folder


def test_what_is_shipped_are_the_checkpoints_bytes(shipped: Path, tiny_llama: tiny.TinyLlama) -> None:
    sent, base = load_file(shipped / SOURCE), load_file(tiny_llama.nf4 / "model.safetensors")
    assert len([name for name in sent if name.endswith(".weight")]) == 2 * 7
    for name, array in sent.items():
        if "quant_state" not in name:  # its JSON text may have other white space
            np.testing.assert_array_equal(array, base[name])
    manifest = bundle.verify(shipped)
    assert manifest.weights == "int8" and FILE not in manifest.files and not (shipped / FILE).exists()
    assert manifest.files[SOURCE].size < 0.75 * manifest.generated[FILE]["size"]
    with pytest.raises(BundleError, match="isn't made yet; `vera-edge install`"):
        bundle.verify(shipped, complete=True)


def test_an_installed_bundle_is_the_int8_export(
    shipped: Path, installed: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "int8"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], plain, mode="branch", weights="int8")
    bundle.verify(installed, complete=True)
    first, second = (
        {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(folder / "onnx" / "model.onnx").graph.initializer
        }
        for folder in (plain, installed)
    )
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    exported.assert_same_logits(plain, shipped, installed)


def test_an_encoder_runs_what_its_int8_export_runs(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    merge_to_folder(merge.prepare(base, [(adapter, 1.0)], "nf4"), tmp_path / "nf4", Rounding("rtn"))
    tiny_encoder.save_tokenizer(tmp_path / "nf4")
    shared: Any = {"base": tmp_path / "nf4", "adapter_paths": [(adapter, 1.0)], "mode": "branch"}
    options = {"head": "fp32", "projections": "fp32"}
    target.export(**shared, out=tmp_path / "int8", weights="int8", options=options)
    apart = {**options, "run": "int8", "origin": "seed"}
    target.export(**shared, out=tmp_path / "shipped", weights="nf4", options=apart)
    manifest = bundle.verify(tmp_path / "shipped")
    assert sorted(manifest.generated) == [FILE, "onnx/model.onnx_data_2"] and manifest.weights == "int8"
    here = install(tmp_path / "shipped", tmp_path / "device").folder
    found = [Encoder.open(folder).embed(tiny_encoder.TEXTS) for folder in (tmp_path / "shipped", here)]
    truth = Encoder.open(tmp_path / "int8").embed(tiny_encoder.TEXTS)
    for embeddings in found:  # in memory, and from the files
        np.testing.assert_array_equal(embeddings, truth)


def test_a_merged_model_beside_projections_by_seed_and_other_formats(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    one = [(tiny_adapter, 1.0)]
    ids = exported.tokens()
    for name, mode, weights, options in (
        ("merged", "merged", "fp4", {}),
        ("seeded", "branch", "nf4", {"origin": "seed"}),
    ):
        out = tmp_path / name
        target.export(
            tiny_llama.nf4, one, out, mode=mode, weights=weights, options={"run": "int8", **options}
        )
        slow = tmp_path / f"{name}-slow"
        target.export(tiny_llama.nf4, one, slow, mode=mode, weights=weights, options={"head": "int8"})
        found = install(out, tmp_path / f"{name}-device").folder
        assert len(bundle.read(out).generated) == 1 + len(options)
        vectors = None if mode == "merged" else out / "adapters" / "default.onnx_adapter"
        drift = exported.divergence(exported.logits(slow, ids, vectors), exported.logits(found, ids, vectors))
        assert drift < 0.01  # that of int8: activations are rounded too


def test_what_cannot_run_so_is_refused(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    for weights, run in (("int4", "int8"), ("fp32", "int8"), ("nf4", "int4")):
        with pytest.raises(PlanError, match=f"{weights} weights can't run as '{run}'"):
            target.export(
                tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out", weights=weights, options={"run": run}
            )
    assert not (tmp_path / "out").exists()


def weight_of(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(value["generated"][FILE]["weights"].values()))
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value["generated"][FILE].update(block=48), "block is 48, not 16 or 32"),
        (lambda value: value["generated"][FILE].pop("weights"), "has no"),
        (lambda value: weight_of(value).update(codes=-1), "codes is -1"),
        (lambda value: weight_of(value).update(codes=1 << 40), "reaches past the end"),
        (lambda value: weight_of(value)["rows"][0].__setitem__(0, "other"), "lacks rows 0 to"),
        (lambda value: weight_of(value)["rows"][0].__setitem__(2, 1 << 40), "lie over each other"),
        (
            lambda value: weight_of(value)["rows"][0].__setitem__(1, 1 << 50),
            "asks for rows 11258",
        ),
        (lambda value: value["generated"][FILE].update(sha256="0" * 64), "damaged"),
        (lambda value: value["generated"][FILE].update(source="../x"), "names no listed source"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    change: Callable[[dict[str, Any]], Any], says: str, shipped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(shipped, folder)
    rewrite(folder, lambda value: (value.update(projection=None), change(value)))
    with pytest.raises(BundleError, match=says):
        install(folder, tmp_path / "device")
    assert not (tmp_path / "device" / "current").exists()


def test_shipped_weights_that_are_no_safetensors(shipped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(shipped, folder)
    (folder / SOURCE).write_bytes(b"\xff" * 64)
    manifest = bundle.read(folder)
    facts = bundle.change(manifest)
    bundle.write(folder, facts)
    with pytest.raises(VeraEdgeError, match=r"model\.4bit\.safetensors") as caught:
        install(folder, tmp_path / "device")
    assert "\n" not in str(caught.value)
    assert json.loads((folder / bundle.MANIFEST).read_text())["generated"]
