"""The export of a real encoder, all-MiniLM-L6-v2, through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts import demo_encoder
from tests import exported
from tests.conftest import Cli
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.encoder import Encoder

SENTENCES = ["An adapter of kilobytes, swapped in milliseconds.", "Merge, then quantize again."]


@pytest.mark.real
def test_minilm_gives_the_hidden_states_of_peft(cli: Cli, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    made, out = demo_encoder.prepare(), tmp_path / "out"
    run = cli("export", made.base, made.adapter, "-o", out, "--onnx", "--mode", "merged", "--weights", "fp32")
    assert run.exit_code == 0, run.stderr
    inputs = AutoTokenizer.from_pretrained(out)(SENTENCES, padding=True, return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(made.base), made.adapter).eval()
    with torch.no_grad():
        truth = model(**inputs).last_hidden_state.numpy()
        with model.disable_adapter():
            base = model(**inputs).last_hidden_state.numpy()
    feeds = {name: value.numpy() for name, value in inputs.items()}
    (found,) = exported.session(out).run(["last_hidden_state"], feeds)
    assert exported.error(found, truth) < 1e-4
    assert exported.error(base, truth) > 0.1  # so that a lost adapter would have failed
    assert np.isfinite(found).all()
    assert bundle.verify(out, deep=True).kind == "encoder"
    mask = inputs["attention_mask"].numpy()[:, :, None]
    pooled = (truth * mask).sum(axis=1) / mask.sum(axis=1)
    assert exported.error(Encoder.open(out).embed(SENTENCES), pooled) < 1e-4
    made_golden = cli("golden", out, made.base, made.adapter, "--min-cosine", 0.9999)
    assert made_golden.exit_code == 0, made_golden.stderr
    validated = cli("validate", out)
    assert validated.exit_code == 0, validated.stderr
