"""Settings of a config that change what a decoder computes: llama.cpp computes the same, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import vera_edge
from tests import tiny
from tests.config_fields import CASES, Case
from vera_edge.errors import TargetError
from vera_edge.exporting import target
from vera_edge.storage.files import sha256_bytes
from vera_edge_gguf import EXPORTER
from vera_edge_gguf.families import FAMILIES
from vera_edge_gguf.hyperparameters import Hyperparameters, hyperparameters

# What llama.cpp can't be told of: refused, in these words.
REFUSED = {
    "activation": "asks for the activation",
    "attention scaling": "asks for query_pre_attn_scalar",
    "attention in both directions": "attention in both directions",
    "layers without RoPE": "other layers without rotary embeddings",
}
OF_ONE = {
    ("Qwen2ForCausalLM", "head size"): "asks for heads of 48",
    ("Gemma3ForCausalLM", "softcaps"): "asks for attn_logit_softcapping",
    ("Gemma2ForCausalLM", "head size"): "asks for query_pre_attn_scalar",
    ("Gemma3ForCausalLM", "head size"): "asks for query_pre_attn_scalar",
    ("Phi3ForCausalLM", "head size"): "asks for heads of 48",
}
OF_ONE |= {
    (name, f"RoPE {kind}"): f"scaled by {kind}, for which"
    for name, family in FAMILIES.items()
    for kind in ("llama3", "longrope")
    if kind not in family.factors
}
COMPUTED = Path(__file__).with_name("computed_in_llama_cpp.json")  # written where all of them were computed
OURS = [case for case in CASES if case.architecture in FAMILIES]


def exported(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The case's model as GGUF, an adapter that adds nothing merged into it."""
    from peft import VeraConfig, get_peft_model

    monkeypatch.setattr(target, "find", lambda name: EXPORTER)
    base = tiny.save(case.model(), folder / "base")
    names = ["qkv_proj"] if case.architecture == "Phi3ForCausalLM" else ["q_proj"]
    settings = VeraConfig(r=2, target_modules=names, save_projection=False)
    get_peft_model(tiny.load(base), settings).save_pretrained(folder / "adapter")
    return vera_edge.export(
        base, folder / "adapter", out=folder / "out", target="gguf", weights="f32", trained_as="float"
    ).model


def expected(case: Case) -> str | None:
    return OF_ONE.get((case.architecture, case.setting), REFUSED.get(case.setting))


@pytest.mark.parametrize("case", [case for case in OURS if expected(case)], ids=lambda case: case.name)
def test_a_setting_that_llama_cpp_lacks_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match=expected(case)):
        exported(case, tmp_path, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [case for case in OURS if not expected(case)], ids=lambda case: case.name)
def test_a_setting_is_computed_in_llama_cpp(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the context that the file says it has, which ends where the two would differ."""
    pytest.importorskip("llama_cpp")
    from vera_edge.base.checkpoint import Checkpoint
    from vera_edge.device.llama.runner import LlamaRunner
    from vera_edge.reference.model import open_reference

    file = exported(case, tmp_path, monkeypatch)
    wanted = open_reference(Checkpoint.open(tmp_path / "base"))
    longest = LlamaRunner(file).context
    lengths = {min(longest, 60), min(longest, 120)}
    if "longrope" in case.setting:
        lengths.remove(60)  # llama.cpp's context is 256 tokens at least, and goes by that
    for length in sorted(lengths):
        tokens = np.random.default_rng(4).integers(3, tiny.VOCABULARY, length)
        found = LlamaRunner(file, context=length).logits(tokens)
        right = wanted.logits(tokens)
        assert np.abs(found - right).max() < 2e-2 * np.abs(right).max(), length


def told_digest(case: Case) -> str:
    """Of all that llama.cpp is told of a case's settings: five digits of a number, as libraries differ."""
    found = hyperparameters(case.config(), FAMILIES[case.architecture])
    tensors = {name: values.tolist() for name, values in found.tensors.items()}
    text = json.dumps(_short({**found.metadata, **tensors}), sort_keys=True)
    return sha256_bytes(text.encode())[:12]


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return f"{value:.5g}" if isinstance(value, float) else value


def test_llama_cpp_is_told_what_it_was_when_it_computed_each_setting() -> None:
    """What holds the settings where llama-cpp-python isn't installed. Where this differs, run the test above
    with it, and write what is found here into the file."""
    found = {case.name: told_digest(case) for case in OURS if not expected(case)}
    assert found == json.loads(COMPUTED.read_text())


def test_a_window_that_llama_cpp_lacks_bounds_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in OURS if case.name == "MistralForCausalLM, sliding window")
    file = gguf.GGUFReader(exported(case, tmp_path, monkeypatch))
    assert file.fields["llama.context_length"].contents() == 24


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def told(architecture: str, rope: Any) -> Hyperparameters:
    """What llama.cpp is told of an architecture's usual config with these rotary embeddings."""
    config = Case(architecture, "", {"rope_parameters": rope}).config()
    return hyperparameters(config, FAMILIES[architecture])


@pytest.mark.parametrize("setting", [{"beta_fast": 16.0}, {"beta_slow": 2.0}])
def test_turns_of_yarn_that_llama_cpp_reads_from_no_file_are_refused(setting: dict[str, float]) -> None:
    """Of the families written here; llama-cpp-python 0.3.36 computes 32 and 1 whatever the file says."""
    told("Qwen2ForCausalLM", {**YARN, "beta_fast": 32.0, "beta_slow": 1.0})
    with pytest.raises(TargetError, match=r"yarn with a beta_(fast of 16|slow of 2) is computed with"):
        told("Qwen2ForCausalLM", {**YARN, **setting})


def test_an_attention_factor_beside_layers_with_a_window_is_refused() -> None:
    """llama.cpp would scale those too, as it was found to (logits off by 0.8 of their largest)."""
    sliding = {"rope_type": "default", "rope_theta": 1e3}
    usual = told("Gemma3ForCausalLM", {"full_attention": YARN, "sliding_attention": sliding})
    assert usual.metadata["gemma3.rope.scaling.type"] == "yarn"
    asked = {"full_attention": {**YARN, "attention_factor": 2.5}, "sliding_attention": sliding}
    with pytest.raises(TargetError, match="an attention_factor of its own"):
        told("Gemma3ForCausalLM", asked)
    assert told("Gemma2ForCausalLM", asked["full_attention"]).metadata["gemma2.rope.scaling.attn_factor"] > 2


def test_yarn_without_a_factor_goes_by_the_two_contexts() -> None:
    assert told("Qwen2ForCausalLM", {**YARN, "factor": None}).metadata["qwen2.rope.scaling.factor"] == 2


def test_rotary_embeddings_of_a_part_of_each_head_are_refused_but_of_phi3() -> None:
    """llama.cpp ends the process at them."""
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(TargetError, match=r"rotary embeddings of 0\.5 of each head"):
        told("Qwen2ForCausalLM", part)
    assert told("Phi3ForCausalLM", part).metadata["phi3.rope.dimension_count"] == 8
