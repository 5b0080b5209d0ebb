"""Rounding before an export: the graph holds the compensated codes, and drifts less than a rounded one."""

from __future__ import annotations

import shutil
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
from vera_edge.reference.model import load_dense
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge.text.windows import open_tokenizer


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
