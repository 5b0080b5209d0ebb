"""Packing for a branch bundle: the vectors arrive exactly, and what belongs elsewhere is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.conftest import Cli
from vera_edge.adapters import reading as adapters
from vera_edge.adapters.vera import vectors_of
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.errors import MismatchError, OutputError, PlanError
from vera_edge.exporting import onnx_adapter as packing
from vera_edge.exporting import target


@pytest.fixture(scope="module")
def branch(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packing") / "branch"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="fp32")
    return out


def test_a_packed_adapter_holds_the_vectors_and_runs(
    branch: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=77)
    packed = tmp_path / "other.onnx_adapter"
    assert cli("adapter", "pack", other, "--for", branch, "-o", packed).exit_code == 0
    read = onnxruntime.AdapterFormat.read_adapter(str(packed)).get_parameters()
    pairs = vectors_of(adapters.read(other))
    assert sorted(read) == ["vera.lambda_b", "vera.lambda_d"]
    layout = bundle.read(branch).vectors
    assert {module for module, _, _ in layout} == pairs.keys()
    rows = np.concatenate([pairs[module].lambda_b[start:stop] for module, start, stop in layout])
    np.testing.assert_array_equal(read["vera.lambda_b"].numpy(), rows[None, None])
    scales = np.concatenate([pairs[module].lambda_d for module in dict.fromkeys(m for m, _, _ in layout)])
    np.testing.assert_array_equal(read["vera.lambda_d"].numpy(), scales[None, None])
    tokens = np.arange(3, 30, dtype=np.int64)
    session = Session.open(branch)
    before = session.logits(tokens)
    session.swap(packed)
    after = session.logits(tokens)
    own = tmp_path / "own"
    target.export(tiny_llama.nf4, [(other, 1.0)], own, mode="branch", weights="fp32")
    expected = Session.open(own).logits(tokens)
    np.testing.assert_allclose(after, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(before - after).max() > 0.01 * np.abs(expected).max()


def test_an_adapter_says_which_base_and_projections_it_is_for(
    branch: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    manifest = bundle.read(branch)
    assert manifest.projection is not None and manifest.requires == {"onnxruntime": "1.22"}
    expected = packing.model_version(manifest.base["digest"], manifest.projection["digest"], manifest.vectors)
    assert manifest.model_version == expected and 0 < expected < 1 << 31
    packed = tmp_path / "packed.onnx_adapter"
    assert cli("adapter", "pack", tiny_adapter, "--for", branch, "-o", packed).exit_code == 0
    for path in (packed, branch / "adapters" / "default.onnx_adapter"):
        assert onnxruntime.AdapterFormat.read_adapter(str(path)).get_model_version() == expected
    other = tmp_path / "other"
    target.export(tiny_llama.fp32, [(tiny_adapter, 1.0)], other, mode="branch", projection_rounding="bf16")
    assert bundle.read(other).model_version != expected
    with pytest.raises(MismatchError, match="made for another base or another projection"):
        Session.open(other, packed)


@pytest.fixture(scope="module")
def half(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch whose vectors are float16."""
    out = tmp_path_factory.mktemp("packing") / "half"
    options = {"vectors": "fp16"}
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", options=options)
    return out


def test_a_bundle_may_take_its_vectors_in_float16(
    half: Path, branch: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    other, files = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=77), []
    for bundle_folder in (branch, half):
        files.append(tmp_path / f"{bundle_folder.name}.onnx_adapter")
        assert cli("adapter", "pack", other, "--for", bundle_folder, "-o", files[-1]).exit_code == 0
    wide, narrow = (onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters() for path in files)
    for name, value in narrow.items():
        assert value.numpy().dtype == np.float16
        np.testing.assert_array_equal(value.numpy(), wide[name].numpy().astype(np.float16))
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    tokens = np.arange(3, 30, dtype=np.int64)
    session = Session.open(half, files[1])
    expected = Session.open(branch, files[0]).logits(tokens)
    found = session.logits(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    for folder, path in ((half, files[0]), (branch, files[1])):
        with pytest.raises(MismatchError, match="the graph takes float"):
            Session.open(folder, path)
    batch = session.generate_batch([tokens, tokens], [files[1], None], max_tokens=4)
    list(batch)
    for row, adapter in enumerate((files[1], None)):
        session.swap(adapter)
        alone = session.generate(tokens, max_tokens=4)
        list(alone)
        assert alone.tokens == batch.tokens[row]
    assert batch.tokens[0] != batch.tokens[1]


@pytest.mark.parametrize("weight", [1e8, 1e-9])
def test_vectors_that_float16_cannot_hold_are_refused(
    weight: float, half: Path, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    packed = tmp_path / "x.onnx_adapter"
    result = cli("adapter", "pack", tiny_adapter, "--for", half, "-o", packed, "--weight", str(weight))
    assert result.exit_code == 2 and "doesn't fit float16, which holds" in result.stderr
    assert result.stderr.count("\n") == 1 and not packed.exists()


def test_merged_adapters_leave_no_vectors_to_store(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    result = cli("export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "x", "--vectors", "fp16")
    assert result.exit_code == 2 and "leave vectors out, or add --mode branch" in result.stderr
    assert not (tmp_path / "x").exists()


def test_the_same_vectors_give_the_same_bytes(
    branch: Path, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    for name in ("one", "two"):
        assert cli("adapter", "pack", tiny_adapter, "--for", branch, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, "has rank 4"),
        ({"seed": 32}, "has projection seed 32"),
        ({"targets": ("q_proj",), "save_projection": True}, "aren't those of"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    options: dict[str, object],
    words: str,
    branch: Path,
    tiny_llama: tiny.TinyLlama,
    tmp_path: Path,
    cli: Cli,
) -> None:
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", **options)  # type: ignore[arg-type]
    result = cli("adapter", "pack", other, "--for", branch, "-o", tmp_path / "x.onnx_adapter")
    assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "x.onnx_adapter").exists()


def test_projections_that_no_seed_gives_are_only_for_adapters_that_hold_them(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    kept = tiny.make_adapter(tiny_llama.nf4, tmp_path / "kept", save_projection=True)
    state = load_file(kept / "adapter_model.safetensors")
    state["base_model.vera_A"] = state["base_model.vera_A"] * 1.5
    save_file(state, kept / "adapter_model.safetensors", {"format": "pt"})
    out, packed = tmp_path / "branch", tmp_path / "x.onnx_adapter"
    target.export(tiny_llama.nf4, [(kept, 1.0)], out, mode="branch", weights="nf4")
    packing.pack_folder(kept, out, packed)
    unkept = tiny.make_adapter(tiny_llama.nf4, tmp_path / "unkept")
    with pytest.raises(MismatchError, match="doesn't hold its projections"):
        packing.pack_folder(unkept, out, packed, force=True)


def test_a_bundle_holds_only_what_it_lists(branch: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is in the bundle"):
        packing.pack_folder(tiny_adapter, branch, branch / "adapters" / "more.onnx_adapter")
    with pytest.raises(PlanError, match="give a finite number"):
        packing.pack_folder(tiny_adapter, branch, tmp_path / "x.onnx_adapter", float("nan"))
    bundle.verify(branch)


def test_a_merged_bundle_takes_no_adapter(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "merged", mode="merged", weights="fp32")
    result = cli("adapter", "pack", tiny_adapter, "--for", tmp_path / "merged", "-o", tmp_path / "x")
    assert result.exit_code == 2 and "has its adapter merged" in result.stderr


def test_list_and_diff(
    branch: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    assert "* default" in cli("adapter", "list", branch).stdout
    assert cli("adapter", "diff", tiny_adapter, tiny_adapter).stdout.strip() == "nothing differs"
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=6)
    shown = cli("adapter", "diff", tiny_adapter, other).stdout
    assert "vectors of model.layers." in shown and "and those of 4 more layers" in shown
