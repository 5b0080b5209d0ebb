"""The arithmetic of a device, run on torch's own processor device, against the compiled loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vera_edge
from tests import tiny
from tests.conftest import Cli
from tests.unit.requantize.test_grids import GRIDS, gram, normal
from tests.unit.rounding.test_writeback import letters
from vera_edge import merging
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents
from vera_edge.errors import PlanError
from vera_edge.requantize import GGML_GRIDS, Gram, output_error, requantize
from vera_edge.requantize.devices import chosen, enough_memory, placed, told
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder

ALL = {**GRIDS, **{name: GGML_GRIDS[name] for name in ("q4_0", "iq4_nl", "q4_k")}}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("inside", [256, 100])
def test_what_a_device_rounds_is_what_the_processor_does(name: str, inside: int) -> None:
    grid = ALL[name]
    if grid.ggml and inside % 256:
        pytest.skip("llama.cpp's super-blocks are whole")
    weight, prepared = normal(48, inside), Gram.of(gram(inside), 0.1)
    one, other = (requantize(weight, grid, "gptq", placed(prepared, on)) for on in (None, "cpu"))
    errors = [output_error(weight, found.dequantize(), prepared) for found in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    if grid.bits < 8:  # with 256 codes to choose from many scales are as good, and the sums' last bits choose
        assert (one.codes == other.codes).mean() > 0.99


@pytest.mark.parametrize("has", [("moved",), ("stream",), ("moved", "stream")])
def test_equations_are_solved_as_on_the_processor(has: tuple[str, ...]) -> None:
    prepared, weight = Gram.of(7 * gram(300), 0.1), normal(40, 300)
    moved = 0.1 * normal(300, 300, seed=2) if "moved" in has else None
    stream = normal(40, 300, seed=3) if "stream" in has else None
    one, other = (placed(prepared, on).shift(weight, moved, stream) for on in (None, "cpu"))
    np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_a_matrix_that_no_device_can_factor_is_the_processors() -> None:
    values = np.full((64, 64), 1, np.float32) + np.eye(64, dtype=np.float32) * np.float32(1e-7)
    found = placed(Gram.of(values, damp=1e-7), "cpu")
    assert np.isfinite(found.shift(normal(4, 64), None, normal(4, 64))).all()


def test_a_device_that_is_not_there_is_said_so(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    assert chosen("cpu") is None and told(None) is None
    there = torch.cuda.is_available(), torch.backends.mps.is_available()
    assert chosen("auto") == ("cuda" if there[0] else "mps" if there[1] else None)
    with pytest.raises(PlanError, match="no device is called 'tpu'; known: auto, cpu, cuda, mps"):
        chosen("tpu")
    missing = [name for name, is_there in zip(("cuda", "mps"), there, strict=True) if not is_there]
    words = (tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out")
    for name in missing:
        for command in (("merge", *words), ("export", *words, "--weights", "int4")):
            result = cli(*command, "--compute-device", name)
            assert result.exit_code == 2 and f"there is no {name} device" in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_device_without_memory_is_said_so() -> None:
    said = pytest.raises(PlanError, match=r"^the memory of mps doesn't hold a layer; choose cpu instead$")
    with said, enough_memory("mps", "a layer"):
        raise torch.OutOfMemoryError("MPS backend out of memory")
    with enough_memory(None, "a layer") as nothing:
        assert nothing is None


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator is there: torch's own processor device."""
    monkeypatch.setattr("vera_edge.requantize.devices.chosen", lambda name: "cpu" if name == "cuda" else None)


def test_a_model_comes_out_as_near_on_a_device(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, on_torch: None
) -> None:
    ready, text = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)]), tmp_path / "text.txt"
    text.write_text(letters(0))
    found = {}
    for device in ("cpu", "cuda"):
        rounding = Rounding(None, str(text), tokens=2048, device=device)
        report = merge_to_folder(ready, tmp_path / device, rounding)
        assert any("gptq on cpu, calibrated on" in note for note in report.notes) == (device == "cuda")
        found[device] = Checkpoint.open(tmp_path / device)
    for module in found["cpu"].linears:
        one, other = (folder.dequantize(module) for folder in found.values())
        trained = merging.merged_weight(ready.model, module)
        errors = [float(np.square(weight - trained).sum()) for weight in (one, other)]
        assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_a_bundle_says_what_rounded_it(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, on_torch: None
) -> None:
    for device, said in (("cpu", None), ("cuda", "cpu")):
        out = tmp_path / device
        vera_edge.export(
            tiny_llama.nf4, tiny_adapter, out=out, weights="int4", compute_device=device, effort="quick"
        )
        plan = contents.read(out).plan
        assert plan is not None and plan["options"].get("compute_device") == said
