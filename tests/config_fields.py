"""The settings of a decoder's config that change what it computes, and what an export does with each.

A setting is carried (the graph computes what transformers does) or refused with a sentence; the table in the
docs is made of these cases, and tests/unit/exporters/test_parity.py draws each one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests import tiny

CARRIED, REFUSED = "carried", "refused"
_FACTORS = {"short_factor": [1.0 + 0.1 * index for index in range(8)],
            "long_factor": [2.0 + 0.5 * index for index in range(8)]}  # fmt: skip
ROPE: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 64} | _FACTORS,
}
_SIZES: Mapping[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """A config of an architecture. changes: what is set beside the architecture's usual sizes."""

    architecture: str
    setting: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    outcome: str = CARRIED

    @property
    def name(self) -> str:
        return f"{self.architecture}, {self.setting}"

    def config(self) -> Any:
        """transformers' config of the case."""
        import copy

        import transformers

        cls = getattr(transformers, self.architecture)
        return cls.config_class(
            **copy.deepcopy({**_SIZES, **_USUAL.get(self.architecture, {}), **self.changes})
        )

    def model(self) -> Any:
        """A random model whose norms and biases aren't neutral, in float32."""
        import torch
        import transformers

        torch.manual_seed(sum(map(ord, self.name)))
        model = getattr(transformers, self.architecture)(self.config()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model


_WIDE = {"hidden_size": 128, "head_dim": 32}
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "Qwen3ForCausalLM": {"head_dim": 16},
    "GemmaForCausalLM": {"head_dim": 16},
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24},
    "Gemma3ForCausalLM": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "Phi3ForCausalLM": {"original_max_position_embeddings": 128},
    "PhiForCausalLM": _WIDE,
    "NemotronForCausalLM": _WIDE,
    "Ernie4_5ForCausalLM": {"head_dim": 16},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
}
_ALL = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
    "OlmoForCausalLM",
    "NemotronForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "Ernie4_5ForCausalLM",
    "HunYuanDenseV1ForCausalLM",
)


def _rope(architecture: str, kind: str) -> dict[str, Any]:
    parameters = {"rope_theta": 1e4, **ROPE[kind]}
    if architecture in _PARTIAL:
        parameters["partial_rotary_factor"] = 0.5
    changes: dict[str, Any] = {"rope_parameters": parameters}
    if architecture == "Gemma3ForCausalLM":
        local = {"rope_type": "default", "rope_theta": 1e3}
        changes = {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}
    if architecture == "Phi3ForCausalLM":
        changes["original_max_position_embeddings"] = 64
    return changes | ({"max_position_embeddings": 64} if kind == "dynamic" else {})


_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "intermediate size = vocabulary": {"intermediate_size": tiny.VOCABULARY},
    "head size": {"head_dim": 48, "hidden_size": 64},
    "activation": {"hidden_act": "gelu", "hidden_activation": "gelu"},
    "norm epsilon": dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), 0.1),
    "tied embeddings": {"tie_word_embeddings": True},
}
_PARTIAL = ("PhiForCausalLM", "NemotronForCausalLM")


def _cases(architecture: str) -> list[Case]:
    kinds = ROPE if architecture != "Phi3ForCausalLM" else ("longrope",)
    settings = {**_SETTINGS, **{f"RoPE {kind}": _rope(architecture, kind) for kind in kinds}}
    if architecture in _PARTIAL:
        settings["head size"] = {"head_dim": 64, "hidden_size": 128}
    return [Case(architecture, name, changes) for name, changes in settings.items()]


_WINDOWS: Mapping[str, Mapping[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 24},
    "Phi3ForCausalLM": {"sliding_window": 24},
    "Qwen2ForCausalLM": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3ForCausalLM": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    "Gemma2ForCausalLM": {"sliding_window": 16},
    "Gemma3ForCausalLM": {"sliding_window": 16},
    "SmolLM3ForCausalLM": {
        "sliding_window": 24,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
CASES: tuple[Case, ...] = (
    *(case for name in _ALL for case in _cases(name)),
    *(Case(name, "sliding window", changes) for name, changes in _WINDOWS.items()),
    Case("LlamaForCausalLM", "biases", {"attention_bias": True, "mlp_bias": True}),
    Case("GraniteForCausalLM", "biases", {"attention_bias": True, "mlp_bias": True}),
    Case("OlmoForCausalLM", "biases", {"attention_bias": True}),
    Case("OlmoForCausalLM", "clipped q, k, v", {"clip_qkv": 0.5}, REFUSED),
    Case("Ernie4_5ForCausalLM", "biases", {"use_bias": True}),
    Case("NemotronForCausalLM", "biases", {"attention_bias": True, "mlp_bias": True}, REFUSED),
    Case("NemotronForCausalLM", "partial rotary embedding", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    Case("PhiForCausalLM", "partial rotary embedding", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    Case("Phi3ForCausalLM", "partial rotary embedding", _WIDE | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    Case("PhiForCausalLM", "norms of q and k", {"qk_layernorm": True}, REFUSED),
    Case("GraniteForCausalLM", "multipliers", {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7,
        "logits_scaling": 2.0}),
    Case("Gemma2ForCausalLM", "softcaps", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    Case("Gemma3ForCausalLM", "softcaps", {
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}, REFUSED),
    Case("Gemma2ForCausalLM", "attention scaling", {"query_pre_attn_scalar": 100}),
    Case("Gemma3ForCausalLM", "attention scaling", {"query_pre_attn_scalar": 100}),
    Case("Gemma3ForCausalLM", "attention in both directions", {"use_bidirectional_attention": True}, REFUSED),
    Case("SmolLM3ForCausalLM", "layers without RoPE", {"no_rope_layers": [1, 0]}),
    Case("Qwen2ForCausalLM", "one group", {"num_key_value_heads": 1}),
    Case("LlamaForCausalLM", "no groups", {"num_key_value_heads": 4}),
)  # fmt: skip
