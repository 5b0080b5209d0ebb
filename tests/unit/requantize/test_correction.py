"""What is put beside a rounded weight: the low-rank term against numpy's SVD, a bias against the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tests import exported, tiny
from tests.unit.rounding.test_writeback import letters
from vera_edge import merging
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.exporting import target
from vera_edge.reference.model import load_dense
from vera_edge.requantize import CodesFolder, Gram, int_blocks, output_error
from vera_edge.requantize.correction import low_rank
from vera_edge.rounding import recover
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge.rounding.writeback import Calibration, write_back

OUT, IN, TOKENS = 24, 40, 500
WINDOWS = [np.random.default_rng(seed).integers(3, 380, 64) for seed in range(6)]


@pytest.mark.parametrize("rank", [1, 5, OUT, 100])
def test_the_term_is_the_best_of_its_rank(rank: int) -> None:
    rng = np.random.default_rng(rank)
    error = rng.standard_normal((OUT, IN)).astype(np.float32)
    x = rng.standard_normal((TOKENS, IN)) @ rng.standard_normal((IN, IN)) / IN**0.5
    gram = Gram.of(x.T @ x / TOKENS)
    up, down = low_rank(error, gram, rank)
    singular = np.linalg.svd(error @ sqrtm(gram.values.astype(np.float64)).real, compute_uv=False)
    least = float(np.square(singular[rank:]).sum())
    assert up.shape == (OUT, min(rank, OUT)) and down.shape == (min(rank, OUT), IN)
    rounding = 1e-5 * output_error(error, np.zeros_like(error), gram)
    assert output_error(error, up @ down, gram) == pytest.approx(least, rel=1e-3, abs=rounding)


def test_a_bias_brings_every_mean_output_to_the_trained_one(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Seen by hooks on two whole models: the one that was trained, and the one that runs corrected."""
    merging.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "exact", "fp32")
    trained, corrected = (load_dense(Checkpoint.open(tmp_path / "exact")).eval() for _ in range(2))
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])
    modules = [step.module for step in ready.plan.steps if step.action == "merge"]
    store = CodesFolder(tmp_path)
    grids = dict.fromkeys(modules, int_blocks(4, 32, symmetric=False))
    calibration = Calibration(WINDOWS, recover=("low-rank=2", "bias"))
    won = write_back(ready.model, grids, calibration, store.put)
    assert set(won.corrections) == set(modules) and not won.vectors
    for module in modules:
        linear, found = corrected.get_submodule(module), won.corrections[module]
        assert found.weight is not None and found.bias is not None
        linear.weight.data = torch.from_numpy(store[module].dequantize() + found.weight)
        linear.bias = torch.nn.Parameter(torch.from_numpy(found.bias), requires_grad=False)
    # o_proj and down_proj also make up for the stream of hidden states, so their own outputs differ by that.
    own = [module for module in modules if not module.endswith(("o_proj", "down_proj"))]
    wanted, ours = mean_outputs(trained, own), mean_outputs(corrected, own)
    for module in own:
        np.testing.assert_allclose(ours[module], wanted[module], atol=1e-3 * np.abs(wanted[module]).max())
    last = "model.norm"
    off = np.abs(mean_outputs(corrected, [last])[last] - mean_outputs(trained, [last])[last])
    assert off.max() < 0.05, "the stream's mean ends where the trained one's does"


def mean_outputs(model: torch.nn.Module, modules: Sequence[str]) -> dict[str, np.ndarray]:
    sums: dict[str, torch.Tensor | float] = dict.fromkeys(modules, 0.0)

    def add(name: str, output: torch.Tensor) -> None:
        sums[name] = sums[name] + output.reshape(-1, output.shape[-1]).double().sum(0)

    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: add(name, output))
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.from_numpy(window[None]))
    count = sum(len(window) for window in WINDOWS)
    return {name: (total / count).numpy() for name, total in sums.items() if not isinstance(total, float)}


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_a_term_of_full_rank_undoes_the_rounding_in_the_graph(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, mode: str
) -> None:
    """Against PEFT's forward: what is left is float16's rounding of the term, not int2's of the weights."""
    (tmp_path / "text.txt").write_text(letters(0))
    base, ids = tiny_llama.fp32, exported.tokens()
    adapter = tiny.make_adapter(base, tmp_path / "adapter")
    truth = exported.peft_logits(base, adapter, ids)
    errors = {}
    for name, parts in (("plain", ()), ("full", ("low-rank=512",)), ("both", ("low-rank=512", "bias"))):
        out = tmp_path / name
        done = target.export(
            base,
            [(adapter, 1.0)],
            out,
            mode=mode,
            weights="int2",
            options={"accuracy_level": "0", "head": "fp32"},
            rounding=Rounding(None, str(tmp_path / "text.txt"), recover=parts),
        )
        errors[name] = exported.error(
            exported.logits(out, ids, next(iter(done.adapters.values()), None)), truth
        )
    assert errors["plain"] > 0.05
    assert errors["full"] < 0.01 and errors["both"] < 0.01, errors
    assert any("low-rank=512 and bias of" in note for note in done.notes)


def test_what_cannot_be_recovered_is_refused(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    for word in ("low-rank", "low-rank=0", "low-rank=x", "low-rank=5000", "lambda"):
        with pytest.raises(PlanError, match="can't be recovered; choose from"):
            recover.parse([word])
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])
    with pytest.raises(PlanError, match="only an exported graph"):
        merge_to_folder(ready, tmp_path / "out", Rounding(None, recover=("bias",)))
    (tmp_path / "text.txt").write_text(letters(0))
    with pytest.raises(PlanError, match="can't be given a low-rank term or a bias"):
        target.export(
            tiny_llama.nf4,
            [(tiny_adapter, 1.0)],
            tmp_path / "out",
            weights="nf4",
            options={"run": "int8"},
            rounding=Rounding("gptq", str(tmp_path / "text.txt"), recover=("bias",)),
        )
    assert not (tmp_path / "out").exists()
