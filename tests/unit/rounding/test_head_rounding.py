"""The output head rounded with compensation: less is lost, alike layer by layer, and exports hold it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import exported, tiny
from tests.unit.rounding.test_writeback import WINDOWS, alone, letters
from vera_edge import merging
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.exporting import target
from vera_edge.plans.plan import HEAD
from vera_edge.reference.model import load_dense
from vera_edge.requantize import Codes, Grid, int_blocks, requantize
from vera_edge.rounding.journal import RoundingJournal
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge.rounding.writeback import Calibration, write_back

GRID = int_blocks(4, 32, symmetric=False)


def grids(checkpoint: Checkpoint) -> dict[str, Grid]:
    return dict.fromkeys([*checkpoint.linears, HEAD], GRID)


def codes_of(base: Path, **options: Any) -> Mapping[str, Codes]:
    model, found = alone(Checkpoint.open(base)), dict[str, Codes]()
    calibration = Calibration(WINDOWS[:8], sees="inputs")
    write_back(model, grids(model.checkpoint), calibration, found.__setitem__, **options)
    return found


def final_states(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(
            [
                model.model(input_ids=torch.from_numpy(window[None])).last_hidden_state[0]
                for window in WINDOWS[:8]
            ]
        )


def untied(folder: Path) -> Path:
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    return tiny.save(transformers.LlamaForCausalLM(settings), folder)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_gives_what_it_gave_before_any_layer_was_rounded(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, tied: bool
) -> None:
    """Its logits are nearer to the model's than those of one rounded to nearest; behind rounded layers, where
    the embeddings are another table."""
    base = tiny_llama.fp32 if tied else untied(tmp_path / "base")
    found, model = codes_of(base), load_dense(Checkpoint.open(base)).eval()
    weight = model.lm_head.weight.detach().numpy().copy()
    truth = final_states(model).numpy() @ weight.T
    for module, codes in found.items() if not tied else ():
        if module != HEAD:
            model.get_submodule(module).weight.data = torch.from_numpy(codes.dequantize())
    now = final_states(model).numpy()
    nearest = requantize(weight, GRID, "rtn")
    errors = [np.square(now @ one.dequantize().T - truth).sum() for one in (found[HEAD], nearest)]
    assert errors[0] < 0.95 * errors[1]


def test_the_head_is_the_same_layer_by_layer_and_from_a_journal(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    whole, light = codes_of(tiny_llama.fp32), codes_of(tiny_llama.fp32, layer_by_layer=True)
    journal = RoundingJournal(tmp_path, grids(Checkpoint.open(tiny_llama.fp32)))
    codes_of(tiny_llama.fp32, journal=journal)
    again = RoundingJournal(tmp_path, journal.grids)
    recalled = codes_of(tiny_llama.fp32, journal=again)
    for other in (light, recalled):
        assert (other[HEAD].codes == whole[HEAD].codes).all()
        assert (other[HEAD].scales == whole[HEAD].scales).all()


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_an_export_with_a_head_of_4_bits_holds_the_head_that_was_rounded_with_care(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, mode: str
) -> None:
    """The table of tied embeddings and the head are these codes, two to a byte, the first in the low half."""
    (tmp_path / "text.txt").write_text(letters(0))
    base, adapters = tiny_llama.nf4, [(tiny_adapter, 1.0)]
    rounding = Rounding("gptq", str(tmp_path / "text.txt"), tokens=1024)
    asked: dict[str, Any] = {"mode": mode, "weights": "int4", "rounding": rounding}
    made = target.export(base, adapters, tmp_path / "out", options={"head": "int4"}, **asked)
    ready = target.plan_export(
        base, adapters, tmp_path / "plan", target.ExportArguments(mode=mode, weights="int4")
    )
    model = merging.prepare(base, adapters, "nf4").model
    with rounding.codes(model, ready.plan, tmp_path / "again", head=GRID) as rounded:
        codes, nearest = rounded.codes[HEAD], load_dense(model.checkpoint).lm_head.weight.detach().numpy()
        for name in ("lm_head.weight.int4", "lm_head.weight.int4.rows"):
            packed = exported.data(made.folder, name).reshape(codes.shape[0], -1)
            assert (packed == codes.codes[:, 0::2] | codes.codes[:, 1::2] << 4).all()
        assert (codes.codes != requantize(nearest, GRID, "rtn").codes).any()


def test_a_head_that_is_adapted_is_left_to_the_layers(tmp_path: Path) -> None:
    from tests.unit.exporters.test_decoder import family_base

    base, adapter = family_base("llama with an adapted head", tmp_path)
    (tmp_path / "text.txt").write_text(letters(0))
    rounding = Rounding("gptq", str(tmp_path / "text.txt"), tokens=1024)
    ready = merging.prepare(base, [(adapter, 1.0)], "nf4")
    with rounding.codes(ready.model, ready.plan, tmp_path / "out", head=GRID) as rounded:
        assert HEAD not in rounded.codes
        assert any("rounded to nearest" in note for note in rounded.notes)
