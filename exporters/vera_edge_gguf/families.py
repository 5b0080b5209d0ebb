"""The families of decoders that llama.cpp and transformers compute alike, and what is peculiar to each.

Source: llama.cpp's src/models (which tensors and settings it reads) and transformers' modelling files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vera_edge.errors import TargetError


@dataclass(frozen=True)
class Family:
    """A class of transformers, as llama.cpp has it.

    architecture: llama.cpp's name. activation: what the MLP must use, as config.json may spell it.
    interleaved: rotary embeddings turn neighbouring rows of a head, where transformers turns its two halves.
    norm_shift: transformers multiplies by 1 + weight. window: layers with a sliding window are computed.
    biases: which linears of a layer may have one. tied: the output head is the embedding, always.
    factors: the ways to scale rotary embeddings by a factor for each pair of rows, for which it has a place.
    """

    architecture: str
    activation: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norm_shift: bool = False
    window: bool = False
    biases: frozenset[str] = frozenset()
    tied: bool = False
    factors: tuple[str, ...] = ()


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
_GELU = ("gelu_pytorch_tanh",)
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", interleaved=True, biases=_ALL, factors=("llama3", "longrope")),
    "MistralForCausalLM": Family("llama", interleaved=True, factors=("llama3", "longrope")),
    "SmolLM3ForCausalLM": Family("smollm3", interleaved=True, biases=_QKV),
    "Qwen2ForCausalLM": Family("qwen2", biases=_QKV),
    "Qwen3ForCausalLM": Family("qwen3", biases=_QKV),
    "Phi3ForCausalLM": Family("phi3", factors=("longrope",)),
    "Gemma2ForCausalLM": Family("gemma2", _GELU, norm_shift=True, window=True, biases=_QKV, tied=True),
    "Gemma3ForCausalLM": Family("gemma3", _GELU, norm_shift=True, window=True, biases=_QKV),
    "GPT2LMHeadModel": Family(
        "gpt2",
        ("gelu_new", "gelu_pytorch_tanh"),
        biases=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}


def family_of(architecture: str) -> Family:
    """The family of a class of transformers. Raises TargetError for one that isn't written as GGUF."""
    if architecture not in FAMILIES:
        raise TargetError(
            f"{architecture or 'a model without a class'} isn't written as GGUF; vera-edge writes "
            f"{', '.join(FAMILIES)}: export it to onnx"
        )
    return FAMILIES[architecture]
