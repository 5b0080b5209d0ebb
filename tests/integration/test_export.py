"""`vera-edge export` through the command line, on the real model and on tiny ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from scripts.prepare_demo import Demo
from tests import exported, tiny
from tests.conftest import Cli
from tests.exported import Float32, Int64
from vera_edge.adapters import reading as adapters
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.reference.model import open_reference
from vera_edge.trained import provenance

TOKENS = 96


@pytest.fixture(scope="module")
def as_trained(demo: Demo) -> tuple[Int64, Float32]:
    """Tokens of the held-out text, and their logits (TOKENS, vocabulary) by the model as trained."""
    text = demo.eval_text.read_text(encoding="utf-8")
    ids = np.array(Tokenizer.from_file(str(demo.base / "tokenizer.json")).encode(text[:3000]).ids[:TOKENS])
    assert ids.size == TOKENS
    checkpoint, adapter = Checkpoint.open(demo.base), adapters.read(demo.adapter)
    projections = provenance.resolve(adapter, checkpoint).projections
    return ids, open_reference(checkpoint, [(adapter, 1.0)], projections).logits(ids)


@pytest.mark.real
@pytest.mark.parametrize(
    ("mode", "weights", "scale", "limit"), [("merged", "fp32", 1e-4, 1e-7), ("branch", "nf4", 1e-4, 1e-5)]
)
def test_the_real_model_as_trained(
    mode: str,
    weights: str,
    scale: float,
    limit: float,
    demo: Demo,
    as_trained: tuple[Int64, Float32],
    cli: Cli,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    words = ["export", demo.base, demo.adapter, "-o", out, "--onnx", "--mode", mode, "--weights", weights]
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    vectors = Path(facts["adapters"]["default"]) if mode == "branch" else None
    ids, truth = as_trained
    found = exported.logits(out, ids, vectors)
    assert exported.error(found, truth) < scale
    assert exported.divergence(truth, found) < limit
    if weights == "nf4":
        _check_bytes(out, demo.base)


def _check_bytes(out: Path, base: Path) -> None:
    """Every 4-bit byte of the graph is the checkpoint's, q, k and v one after the other."""
    graph = exported.ranges(out)
    with safe_open(base / "model.safetensors", "numpy") as raw:
        stored = [name for name in raw.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
        assert len(stored) == 7 * 30
        for layer in range(30):
            stem = f"model.layers.{layer}"
            for site, names in {
                "attn.qkv_proj": [f"self_attn.{name}_proj" for name in "qkv"],
                "attn.o_proj": ["self_attn.o_proj"],
                **{f"mlp.{name}": [f"mlp.{name}"] for name in ("gate_proj", "up_proj", "down_proj")},
            }.items():
                name = f"{stem}.{site}.weight.nf4"
                assert name in graph
                parts = [raw.get_tensor(f"{stem}.{module}.weight").reshape(-1) for module in names]
                np.testing.assert_array_equal(exported.data(out, name), np.concatenate(parts))


def test_what_it_prints(cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    words = ["export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out", "--onnx", "--mode", "branch"]
    result = cli(*words, "--weights", "nf4")
    assert result.exit_code == 0, result.output
    assert "branch, nf4 weights" in result.stdout and "default.onnx_adapter" in result.stdout
    again = cli(*words, "--weights", "nf4")
    assert again.exit_code == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1
    forced = cli(*words, "--weights", "int8", "--target", "genai", "--force", "--json")
    result = json.loads(forced.stdout)
    assert forced.exit_code == 0 and result["target"] == "onnx"
    assert "the target genai is called onnx now; write that" in result["notes"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--target", "tflite"], "no export target is called 'tflite'"),
        (
            ["--store-projections", "int8", "--mode", "branch", "--adapter", "nowhere"],
            "nowhere isn't a folder",
        ),
        (["--weight", "nan"], "nan"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], match: str, cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    result = cli("export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2 and match in result.stderr
    assert result.stderr.startswith("vera-edge: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_base(cli: Cli, tiny_adapter: Path, tmp_path: Path) -> None:
    result = cli("export", tmp_path / "nowhere", tiny_adapter, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "nowhere" in result.stderr and not list(tmp_path.iterdir())
