"""Bundles that ship the seed alone: what the device draws is what would have been baked, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests import exported, tiny
from tests.conftest import Cli
from vera_edge.adapters.projection import ProjectionSpec, regenerate
from vera_edge.bundle import contents as bundle
from vera_edge.device.deploy.install import install, rollback
from vera_edge.device.deploy.versions import current
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, PlanError
from vera_edge.exporting import target
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json

FILE = "onnx/model.onnx_data_1"
Change = Callable[[dict[str, Any]], Any]


def export(tiny_llama: tiny.TinyLlama, adapter: Path, out: Path, **options: str) -> Path:
    target.export(tiny_llama.nf4, [(adapter, 1.0)], out, mode="branch", weights="fp32", options=options)
    return out


@pytest.fixture(scope="module")
def baked(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_llama, tiny_adapter, tmp_path_factory.mktemp("baked") / "out")


@pytest.fixture(scope="module")
def seeded(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_llama, tiny_adapter, tmp_path_factory.mktemp("seed") / "out", origin="seed")


@pytest.fixture(scope="module")
def installed(seeded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(seeded, tmp_path_factory.mktemp("device")).folder


def rewrite(folder: Path, change: Change) -> None:
    """Change the manifest as somebody would who can also give its digest anew."""
    path = folder / bundle.MANIFEST
    value = json.loads(path.read_bytes())
    change(value)
    value.pop("digest")
    path.write_bytes(canonical_json(value | {"digest": sha256_bytes(canonical_json(value))}))


def test_the_projections_are_not_shipped(baked: Path, seeded: Path) -> None:
    manifest, spec = bundle.verify(seeded), bundle.read(baked).projection
    assert not (seeded / FILE).exists() and FILE not in manifest.files
    assert manifest.projection == spec and spec is not None
    values = spec["rank"] * (spec["in_max"] + spec["out_max"])
    assert 4 * values <= manifest.generated[FILE]["size"] < 4 * values + (1 << 16)
    saved = bundle.read(baked).size - manifest.size
    assert abs(saved - 4 * values) < 8192
    with pytest.raises(BundleError, match=r"model\.onnx_data_1 isn't made yet; `vera-edge install`"):
        bundle.verify(seeded, complete=True)


def test_installing_writes_what_the_seed_gives_where_the_graph_reads_it(
    seeded: Path, installed: Path
) -> None:
    manifest = bundle.verify(installed, complete=True)
    assert manifest.digest == bundle.read(seeded).digest and manifest.projection is not None
    facts = dict(manifest.projection)
    digest = facts.pop("digest")
    drawn = regenerate(ProjectionSpec.from_dict(facts))
    assert drawn.digest == digest
    data, found = (installed / FILE).read_bytes(), 0
    for tensor in onnx.load(installed / "onnx" / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") != "model.onnx_data_1":
            assert not tensor.name.startswith(("vera.A", "vera.B"))
            continue
        matrix = drawn.a.T if tensor.name.startswith("vera.A") else drawn.b
        begin, size = int(place["offset"]), int(place["length"])
        assert data[begin : begin + size] == matrix[: tensor.dims[0]].tobytes()
        found += 1
    assert found > 2


def test_logits_are_those_of_baked_projections(baked: Path, seeded: Path, installed: Path) -> None:
    ids = exported.tokens()
    vectors = baked / "adapters" / "default.onnx_adapter"
    truth = exported.logits(baked, ids, vectors)
    assert np.abs(truth - exported.logits(baked, ids)).max() > 0.01
    exported.assert_same_logits(baked, seeded, installed)


def test_float16_projections_can_be_drawn_too(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    baked = export(tiny_llama, tiny_adapter, tmp_path / "baked", projections="fp16")
    seeded = export(tiny_llama, tiny_adapter, tmp_path / "seed", projections="fp16", origin="seed")
    folder = install(seeded, tmp_path / "device").folder
    assert bundle.read(seeded).generated[FILE]["dtype"] == "float16"
    expected = Session.open(baked, threads=1).logits(exported.tokens())
    for one in (seeded, folder):
        np.testing.assert_array_equal(Session.open(one, threads=1).logits(exported.tokens()), expected)


def test_onnx_runtime_genai_opens_what_was_installed(baked: Path, installed: Path) -> None:
    import onnxruntime_genai as og

    texts = []
    for folder in (baked, installed):
        model = og.Model(str(folder))
        adapters = og.Adapters(model)
        adapters.load(str(folder / "adapters" / "default.onnx_adapter"), "default")
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=40, do_sample=False)
        generator = og.Generator(model, params)
        generator.set_active_adapter(adapters, "default")
        generator.append_tokens(exported.tokens(12).astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        texts.append(list(generator.get_sequence(0)))
    assert texts[0] == texts[1] and len(texts[0]) > 12


def test_a_lost_file_is_drawn_again_and_a_damaged_one_is_found(seeded: Path, tmp_path: Path) -> None:
    first = install(seeded, tmp_path / "device").folder
    assert not install(seeded, tmp_path / "device").changed
    whole = (first / FILE).read_bytes()
    (first / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"model\.onnx_data_1 is damaged"):
        bundle.verify(first)
    with pytest.raises(BundleError, match=r"model\.onnx_data_1 is damaged"):
        Session.open(first)
    (first / FILE).unlink()
    assert install(seeded, tmp_path / "device").changed
    folder = current(tmp_path / "device")
    assert folder is not None and folder != first and (folder / FILE).read_bytes() == whole
    with pytest.raises(BundleError, match="isn't made yet"):
        rollback(tmp_path / "device")


def test_a_spec_that_was_changed_is_refused(seeded: Path, tmp_path: Path) -> None:
    other = shutil.copytree(seeded, tmp_path / "other")
    rewrite(other, lambda value: value["projection"].update(seed=32))
    for attempt in (lambda: install(other, tmp_path / "device"), lambda: Session.open(other)):
        with pytest.raises(BundleError, match="drawn from seed 32 aren't those"):
            attempt()
    assert current(tmp_path / "device") is None
    value = dict(bundle.read(other).projection or {})
    value.pop("digest")
    digest = regenerate(ProjectionSpec.from_dict(value)).digest
    rewrite(other, lambda value: value["projection"].update(digest=digest))
    with pytest.raises(BundleError, match=r"model\.onnx_data_1 is damaged: its SHA-256"):
        install(other, tmp_path / "device")
    assert current(tmp_path / "device") is None
    assert not (tmp_path / "device").exists()


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    return next(iter(value["generated"][FILE]["tensors"].values()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: _tensor(value).update(stop=10**6), "asks for rows 0 to 1000000"),
        (lambda value: _tensor(value).update(start=-1), r"start is -1; it must be at least 0"),
        (lambda value: _tensor(value).update(offset=-4), "offset is -4"),
        (lambda value: _tensor(value).update(offset=1 << 40), "reaches past the end"),
        (
            lambda value: _tensor(value).update(offset=True),
            "offset is True where an integer belongs",
        ),
        (lambda value: _tensor(value).update(matrix="C"), "matrix is 'C', not A.T or B"),
        (lambda value: value["generated"][FILE].update(dtype="float8"), "dtype is 'float8', not float32"),
        (lambda value: value["generated"][FILE].pop("tensors"), r"generated\[.*\] has no source"),
        (lambda value: value["generated"][FILE].pop("sha256"), "has no size and sha256"),
        (lambda value: value["projection"].update(rank=1 << 40), "projection.rank is 1099511627776"),
        (lambda value: value["projection"].pop("seed"), "projection has no seed"),
        (lambda value: value.update(projection=None), "generated files without a projection"),
        (lambda value: value["generated"].update({"../x": value["generated"][FILE]}), "unsafe path"),
        (lambda value: value["generated"].update({"config.json": value["generated"][FILE]}), "listed twice"),
    ],
)
def test_a_hostile_manifest_gets_one_sentence(
    change: Change, says: str, seeded: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(seeded, tmp_path / "other")
    rewrite(other, change)
    with pytest.raises(BundleError, match=says) as caught:
        install(other, tmp_path / "device")
    assert "\n" not in str(caught.value)
    assert current(tmp_path / "device") is None


@pytest.mark.parametrize(
    ("mode", "options", "says"),
    [
        ("merged", {}, "a merged export holds no projections"),
        ("branch", {"projections": "int8"}, "are fp32 or fp16, not int8"),
        ("branch", {"origin": "sand"}, "can't be 'sand'"),
    ],
)
def test_what_a_seed_cannot_do_is_said_first(
    mode: str,
    options: dict[str, str],
    says: str,
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(PlanError, match=says):
        target.export(
            tiny_llama.nf4,
            [(tiny_adapter, 1.0)],
            tmp_path / "out",
            mode=mode,
            options={"origin": "seed", **options},
        )
    assert not (tmp_path / "out").exists()


def test_saved_projections_that_no_seed_gives_are_baked(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter", save_projection=True)
    path = adapter / "adapter_model.safetensors"
    saved = load_file(path)
    (name,) = [name for name in saved if "vera_A" in name]
    saved[name] = saved[name] * np.float32(1.5)
    save_file(saved, path, {"format": "pt"})
    with pytest.raises(PlanError, match="doesn't give the projections that were saved with it"):
        target.export(
            tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "out", mode="branch", options={"origin": "seed"}
        )


def test_the_command_line_says_what_is_missing_and_where_it_comes_from(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    out, device = tmp_path / "out", tmp_path / "device"
    words = ["--mode", "branch", "--weights", "int8", "--projections-from", "seed"]
    assert cli("export", tiny_llama.nf4, tiny_adapter, "-o", out, *words).exit_code == 0
    assert "made by `vera-edge install`" in cli("verify", out).stdout
    assert cli("install", out, device).exit_code == 0
    shown = cli("verify", device / "current").stdout
    assert "sound" in shown and "drawn" not in shown
