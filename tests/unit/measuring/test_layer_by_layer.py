"""Drift of models that are run layer by layer is the drift of the same models held whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny, tiny_encoder
from tests.conftest import Cli
from tests.families import FAMILIES
from vera_edge.exporting import target
from vera_edge.measuring import opened_candidate, opened_reference

QUICK = ("--tokens", 512, "--window", 64, "--json")
NOTES = ("read layer by layer", "parts, one after the other")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def measured(cli: Cli, *words: Any) -> tuple[dict[str, Any], list[str]]:
    """A report, and its notes of models run layer by layer."""
    result = cli("drift", *words, "--json")
    assert result.exit_code in (0, 3), result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    told = [note for note in report["notes"] if any(words in note for words in NOTES)]
    report["notes"] = [note for note in report["notes"] if note not in told]
    return report, told


def test_against_a_merged_folder(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    merged = tmp_path / "merged"
    assert cli("merge", tiny_llama.nf4, tiny_adapter, "--to", "bf16", "-o", merged).exit_code == 0
    words = (tiny_adapter, merged, "--base", tiny_llama.nf4, *QUICK)
    whole, none = measured(cli, *words)
    light, told = measured(cli, *words, "--max-memory", "1KB")
    assert not none and len(told) == 2
    assert light == whole and whole["effect"]["kl"]["mean"]["value"] > 0.01


def test_against_an_export_which_is_opened_after_the_passes(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, weights="int8")
    words = (tiny_adapter, out, "--base", tiny_llama.nf4, *QUICK)
    whole, _ = measured(cli, *words)
    light, told = measured(cli, *words, "--max-memory", "800KB", "--report", tmp_path / "page.html")
    assert len(told) == 1 and "layer by layer" in told[0]
    assert [len(one["candidate"]) for one in light.pop("generations")] == [8, 8, 8]
    del whole["generations"]
    assert light == whole
    trained = opened_reference.open_trained(tiny_adapter, tiny_llama.nf4)
    later = opened_candidate.open_candidate(out, trained=trained.digests, later=True)
    assert later.runner.vocab_size == tiny.VOCABULARY and "_session" not in vars(later.runner)


def test_against_an_export_that_is_run_in_parts(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="nf4")
    words = (tiny_adapter, out, "--base", tiny_llama.nf4, *QUICK)
    whole, none = measured(cli, *words)
    light, told = measured(cli, *words, "--max-memory", "300KB", "--report", tmp_path / "page.html")
    assert not none and len(told) == 2 and "was run in 4 parts" in told[1]
    assert [len(one["candidate"]) for one in light.pop("generations")] == [8, 8, 8]
    del whole["generations"]
    assert light == whole
    # As the reference too, which then gives the base in the same passes.
    alone = (out, out, *QUICK)
    whole, _ = measured(cli, *alone)
    light, told = measured(cli, *alone, "--max-memory", "300KB")
    assert len(told) == 2 and light == whole and whole["effect"]["kl"]["mean"]["value"] > 0.01
    refused = cli("drift", *alone, "--max-memory", "1KB")
    assert refused.exit_code == 2 and "takes 0.2 MB" in refused.stderr and "may take 0.0 MB" in refused.stderr


def test_an_encoder(tmp_path: Path, cli: Cli) -> None:
    base, adapter = tiny_encoder.make(FAMILIES["roberta"], tmp_path)
    merged = tmp_path / "merged"
    assert cli("merge", base, adapter, "--to", "bf16", "-o", merged).exit_code == 0
    words = (adapter, merged, "--base", base)
    whole, _ = measured(cli, *words)
    light, told = measured(cli, *words, "--max-memory", "1KB")
    assert len(told) == 2 and light == whole


def test_by_layer(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """Every exchange is carried along in one pass, and gives what it gives alone."""
    merged = tmp_path / "merged"
    assert cli("merge", tiny_llama.nf4, tiny_adapter, "--to", "bf16", "-o", merged).exit_code == 0
    words = (tiny_adapter, merged, "--base", tiny_llama.nf4, "--by-layer", *QUICK)
    whole, none = measured(cli, *words)
    light, told = measured(cli, *words, "--max-memory", "1KB")
    assert not none and len(told) == 2
    assert len(whole["layers"]) == 14 and all(layer["kl"] > 0 for layer in whole["layers"])
    assert light == whole


def test_by_layer_with_one_behind_the_layers(tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli) -> None:
    """A head that is a linear of both sides goes the whole way by itself."""
    model = tiny.load(tiny_llama.fp32, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0.5)
    base = tiny.save(model, tmp_path / "untied")
    with torch.no_grad():
        model.lm_head.weight.copy_((model.lm_head.weight * 64).round() / 64)
        model.model.layers[1].mlp.up_proj.weight.mul_(1.02)
    changed = tiny.save(model, tmp_path / "changed")
    words = (base, changed, "--by-layer", *QUICK)
    whole, _ = measured(cli, *words)
    light, told = measured(cli, *words, "--max-memory", "1KB")
    assert len(told) == 2 and light == whole
    kl = {layer["module"]: layer["kl"] for layer in whole["layers"]}
    assert kl.pop("lm_head") > 1e-6 and kl.pop("model.layers.1.mlp.up_proj") > 1e-6
    assert max(kl.values()) == 0
