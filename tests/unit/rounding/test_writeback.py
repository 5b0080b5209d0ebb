"""A whole tiny model written back: bitsandbytes runs it, the drift falls, the orders of methods hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from vera_edge import merging
from vera_edge.adapters.projection import ProjectionSpec, regenerate
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError, MismatchError, PlanError
from vera_edge.reference.calibration import LayerInputs
from vera_edge.reference.model import load_dense
from vera_edge.requantize import Codes, CodesFolder, Effort, bnb_grid, int_blocks, requantize
from vera_edge.rounding.weight_rounding import Rounding, default_method, merge_to_folder
from vera_edge.rounding.writeback import Calibration, write_back
from vera_edge.text.windows import open_tokenizer
from vera_edge.trained.trained_model import TrainedModel

WINDOWS = [np.random.default_rng(seed).integers(3, 380, 64) for seed in range(24)]


def letters(seed: int) -> str:
    """Text that the byte-level tokenizer turns into many different tokens."""
    return "".join(chr(code) for code in np.random.default_rng(seed).integers(32, 127, 6000))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(letters(0))
    return path


def logits(model: Any, tokenizer: Path) -> torch.Tensor:
    """Log-probabilities on other text than the calibration's."""
    ids = np.asarray(open_tokenizer(tokenizer).encode(letters(1)).ids, np.int64)[:1024].reshape(8, 128)
    with torch.inference_mode():
        found = [model(input_ids=torch.from_numpy(window[None])).logits[0] for window in ids]
    return torch.log_softmax(torch.cat(found).float(), -1)


def drift(folder: Path, reference: torch.Tensor) -> float:
    """Mean KL of a folder's exact values."""
    other = logits(load_dense(Checkpoint.open(folder)).eval(), folder)
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@pytest.mark.parametrize("to", ["same", "fp4", "int8"])
def test_gptq_drifts_less_than_rounding(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, to: str, text: Path
) -> None:
    base, adapters = tiny_llama.nf4, [(tiny_adapter, 1.0)]
    merging.to_folder(base, adapters, tmp_path / "exact", "fp32")
    reference = logits(load_dense(Checkpoint.open(tmp_path / "exact")).eval(), base)
    ready = merging.prepare(base, adapters, to)
    drifts = {}
    for method in ("rtn", "gptq"):
        report = merge_to_folder(ready, tmp_path / method, Rounding(method, str(text)))
        drifts[method] = drift(tmp_path / method, reference)
    assert drifts["gptq"] < drifts["rtn"]
    assert any("calibrated on" in note for note in report.notes)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"exact", "rtn", "gptq"}, "the codes' scratch folder must be gone"


def test_transformers_and_bitsandbytes_load_what_was_written(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, text: Path
) -> None:
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])
    merge_to_folder(ready, tmp_path / "out", Rounding(None, str(text)))
    ours = Checkpoint.open(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for module, linear in ours.linears.items():
        if linear.in_features % 64 or module == "lm_head":
            continue  # bitsandbytes 0.50 restores garbage on a CPU where blocks run over row ends
        state = {name: part for name, part in stored.items() if name.startswith(f"{module}.weight.")}
        quant_state = bnb.QuantState.from_dict(state, device=torch.device("cpu"))
        restored = bnb.dequantize_4bit(stored[f"{module}.weight"], quant_state).numpy()
        assert (restored == ours.dequantize(module)).all()
    assert tiny.load(tmp_path / "out").config.quantization_config.bnb_4bit_use_double_quant
    record = json.loads((tmp_path / "out" / "vera_edge_merge.json").read_text())
    assert any("gptq" in note for note in record["report"]["notes"])


def alone(checkpoint: Checkpoint) -> TrainedModel:
    """A base without adapters, whose projections nothing reads."""
    return TrainedModel(checkpoint, (), regenerate(ProjectionSpec(0, 1, 1, 1)))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("follow", [0.0, 0.5])
def test_the_walk_requantizes_what_the_plain_function_does(
    tiny_llama: tiny.TinyLlama, merged: bool, follow: float
) -> None:
    """The first input has nothing before it: its codes are those of `requantize` on its own statistics."""
    checkpoint = Checkpoint.open(tiny_llama.fp32)
    modules = [name for name in checkpoint.linears if "layers.0.self_attn" in name]
    found: dict[str, Codes] = {}
    calibration = Calibration(WINDOWS, sees="inputs", follow=follow)
    grids = dict.fromkeys(modules, int_blocks(4, 32, symmetric=False))
    write_back(alone(checkpoint), grids, calibration, found.__setitem__, merged)
    assert found.keys() == set(modules)
    model = load_dense(checkpoint).eval()
    seen: list[torch.Tensor] = []
    module = "model.layers.0.self_attn.q_proj"
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    logits_of = [model(input_ids=torch.from_numpy(window[None])) for window in WINDOWS]
    x = torch.cat(seen).detach().numpy()
    assert len(logits_of) == len(seen)
    damp = LayerInputs((module,), x.T @ x, len(x)).damp
    by_itself = requantize(checkpoint.dequantize(module), grids[module], "gptq", x.T @ x, Effort(damp=damp))
    assert (by_itself.codes == found[module].codes).mean() > 0.98


def test_modules_that_text_never_reaches_are_rounded_all_the_same(tiny_llama: tiny.TinyLlama) -> None:
    checkpoint = Checkpoint.open(tiny_llama.nf4)
    grids = dict.fromkeys(list(checkpoint.linears)[:3], bnb_grid("nf4"))
    found: dict[str, Codes] = {}
    write_back(alone(checkpoint), grids, Calibration((), "hqq"), found.__setitem__)
    assert found.keys() == grids.keys()
    with pytest.raises(MismatchError, match="no linear layer"):
        write_back(alone(checkpoint), {"a.b": bnb_grid("nf4")}, Calibration(()), found.__setitem__)


@pytest.mark.parametrize("grid", [bnb_grid("nf4"), int_blocks(4, 32, symmetric=False)])
def test_codes_come_back_from_the_disk(tmp_path: Path, grid: Any) -> None:
    store = CodesFolder(tmp_path / "codes")
    store.folder.mkdir()
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    codes = requantize(weight, grid, "search")
    store.put("a.b", codes)
    assert (store["a.b"].dequantize() == codes.dequantize()).all()
    assert store.get("a.c") is None
    with pytest.raises(ValueError, match="already"):
        store.put("a.b", codes)


def test_bad_requests_write_nothing(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])
    assert default_method(ready.plan.steps) == "gptq"
    with pytest.raises(DataError, match="missing"):
        merge_to_folder(ready, tmp_path / "out", Rounding(None, str(tmp_path / "nowhere.txt")))
    with pytest.raises(PlanError, match="no quantization method"):
        merge_to_folder(ready, tmp_path / "out", Rounding("best"))
    wide = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "fp32")
    assert default_method(wide.plan.steps) == "rtn"
    with pytest.raises(PlanError, match="no such layer"):
        merge_to_folder(wide, tmp_path / "out", Rounding("gptq"))
    assert not list(tmp_path.iterdir())


def test_later_layers_make_up_for_earlier_ones(tiny_llama: tiny.TinyLlama) -> None:
    """The model ends nearer to the original when each layer follows the ones before it."""
    checkpoint = Checkpoint.open(tiny_llama.fp32)
    modules = [name for name in checkpoint.linears if "layers." in name]
    grids = dict.fromkeys(modules, int_blocks(4, 32, symmetric=False))
    errors = []
    for follow in (0.0, 1.0):
        found: dict[str, Codes] = {}
        write_back(alone(checkpoint), grids, Calibration(WINDOWS, follow=follow), found.__setitem__)
        model = load_dense(checkpoint).eval()
        truth = logits(model, tiny_llama.fp32)
        for name, codes in found.items():
            model.get_submodule(name).weight.data = torch.from_numpy(codes.dequantize())
        errors.append(float((truth.exp() * (truth - logits(model, tiny_llama.fp32))).sum(-1).mean()))
    assert errors[1] < errors[0]
