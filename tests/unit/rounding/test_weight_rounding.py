"""Rounding before an export: the graph holds the compensated codes, and drifts less than a rounded one."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from tests import tiny
from tests.unit.rounding.test_writeback import letters
from vera_edge import merging
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.runtime.session import Session
from vera_edge.errors import PlanError
from vera_edge.exporting import target
from vera_edge.reference.calibration import Sees
from vera_edge.reference.model import load_dense
from vera_edge.requantize import EFFORTS, Codes, Effort
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge.rounding.writeback import Calibration, write_back
from vera_edge.text.windows import make, open_tokenizer, read_text


@pytest.mark.parametrize(("mode", "weights"), [("branch", "int4"), ("merged", "int4"), ("merged", "nf4")])
def test_a_compensated_export_drifts_less(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, mode: str, weights: str
) -> None:
    base, adapters = tiny_llama.nf4, [(tiny_adapter, 1.0)]
    (tmp_path / "text.txt").write_text(letters(0))
    merging.to_folder(base, adapters, tmp_path / "exact", "fp32")
    ids = np.asarray(open_tokenizer(base).encode(letters(1)).ids, np.int64)[:600].reshape(6, 100)
    model = load_dense(Checkpoint.open(tmp_path / "exact")).eval()
    with torch.inference_mode():
        truth = [torch.log_softmax(model(input_ids=torch.from_numpy(row[None])).logits[0], -1) for row in ids]
    drifts = {}
    for method in ("rtn", "gptq"):
        rounding = Rounding(method, str(tmp_path / "text.txt"))
        out = tmp_path / method
        done = target.export(base, adapters, out, mode=mode, weights=weights, rounding=rounding)
        session = Session.open(out)
        ours = [torch.log_softmax(torch.from_numpy(session.logits(row)), -1) for row in ids]
        kl = [(true.exp() * (true - other)).sum(-1).mean() for true, other in zip(truth, ours, strict=True)]
        drifts[method] = float(torch.stack(kl).mean())
    assert drifts["gptq"] < 0.9 * drifts["rtn"]
    assert any("calibrated on" in note for note in done.notes)


def test_an_encoder_is_calibrated_too(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """Its embeddings, merged into NF4 as the command does by default, against PEFT's unmerged ones."""
    settings = transformers.BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(settings).eval()
    model.save_pretrained(tmp_path / "base")
    shutil.copy(tiny_llama.nf4 / "tokenizer.json", tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.VeraConfig(r=8, target_modules=["query", "value", "dense"]))
    for name, parameter in adapted.named_parameters():
        if "vera_lambda_b" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(letters(0))
    tokenizer = open_tokenizer(tmp_path / "base")
    ids = torch.tensor(tokenizer.encode(letters(1)).ids[:600]).reshape(6, 100)
    errors = {}
    with torch.inference_mode():
        truth = adapted.eval()(input_ids=ids).last_hidden_state
        for method in ("rtn", None):
            ready = merging.prepare(tmp_path / "base", [(tmp_path / "adapter", 1.0)], "nf4")
            out = tmp_path / str(method)
            merge_to_folder(ready, out, Rounding(method, str(tmp_path / "text.txt")))
            merged = load_dense(Checkpoint.open(out), "AutoModel").eval()
            errors[method] = float((merged(input_ids=ids).last_hidden_state - truth).square().mean())
    assert errors[None] < 0.8 * errors["rtn"]


def test_a_branch_ships_the_vectors_that_were_refitted(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(letters(0))
    text, adapters = str(tmp_path / "text.txt"), [(tiny_adapter, 1.0)]
    for name, parts in (("plain", ()), ("refitted", ("lambda_b",))):
        rounding = Rounding(None, text, recover=parts)
        done = target.export(
            tiny_llama.nf4, adapters, tmp_path / name, mode="branch", weights="int4", rounding=rounding
        )
    assert any("lambda_b of" in note for note in done.notes)
    plain, refitted = (Session.open(tmp_path / name).vectors for name in ("plain", "refitted"))
    changed = {name.rsplit(".", 1)[1] for name in plain if not np.array_equal(plain[name], refitted[name])}
    assert changed == {"lambda_b"}
    with pytest.raises(PlanError, match="needs --mode branch"):
        out = tmp_path / "merged"
        target.export(tiny_llama.nf4, adapters, out, mode="merged", weights="int4", rounding=rounding)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_reaches_the_calibration_and_is_recorded(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, effort: str
) -> None:
    """The codes are those of calibrating by hand with the effort's numbers."""
    (tmp_path / "text.txt").write_text(letters(0))
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "nf4")
    text = str(tmp_path / "text.txt")
    rounding = Rounding("gptq", text, effort=effort, tokens=512)
    spent = Effort.named(effort)
    codes: dict[str, Codes] = {}
    checkpoint = ready.model.checkpoint
    cut = make(read_text(text), open_tokenizer(checkpoint.path), int(checkpoint.config["vocab_size"]), 512)
    sees: Sees = "inputs" if spent.follows else "original"
    with rounding.codes(ready.model, ready.plan, tmp_path / "out") as rounded:
        grids = {module: rounded.codes[module].grid for module in rounded.codes}
        write_back(ready.model, grids, Calibration(cut.tokens, sees=sees, effort=spent), codes.__setitem__)
        for module, found in rounded.codes.items():
            assert (found.codes == codes[module].codes).all()
        assert any(f"effort {effort}" in note for note in rounded.notes) == (effort != "default")


def test_an_effort_takes_its_own_number_of_tokens(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(letters(0) * 400)
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "nf4")
    rounding = Rounding("gptq", str(tmp_path / "text.txt"), effort="quick")
    with rounding.codes(ready.model, ready.plan, tmp_path / "out") as rounded:
        (tokens,) = (int(re.findall(r"on (\d+) tokens", note)[0]) for note in rounded.notes[:1])
    assert 0.9 < tokens / Effort.named("quick").tokens < 1.1


def test_a_plan_s_effort_is_taken_unless_another_is_asked_for(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(letters(0))
    ready = merging.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "nf4")
    plan = replace(ready.plan, options={**ready.plan.options, "effort": "quick"})
    (tmp_path / "few.txt").write_text(letters(0)[:120])
    widest = max(linear.in_features for linear in ready.model.checkpoint.linears.values())
    for asked, said, text in ((None, "quick", "text.txt"), ("thorough", "thorough", "few.txt")):
        rounding = Rounding("gptq", str(tmp_path / text), tokens=256, effort=asked)
        with rounding.codes(ready.model, plan, tmp_path / "out") as rounded:
            assert f"effort {said}" in rounded.notes[0]
            few = f"give at least {widest} tokens"
            assert any(few in note for note in rounded.notes) == (text == "few.txt")
    with (
        pytest.raises(PlanError, match="no effort is called 'heroic'; known: quick, default, thorough"),
        Rounding("gptq", effort="heroic").codes(ready.model, plan, tmp_path / "out"),
    ):
        pass
