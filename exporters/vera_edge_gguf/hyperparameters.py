"""A model's config.json as llama.cpp's metadata; what it would compute otherwise is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vera_edge.arrays import Float32
from vera_edge.errors import TargetError
from vera_edge_gguf.families import Family
from vera_edge_gguf.rotary import RotaryMetadata, rotary

_GEMMA_LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # models of so many layers scale attention otherwise
_USUAL_PATTERN = {"gemma2": 2, "gemma3": 6}  # every so many layers one sees the whole text


class Hyperparameters(NamedTuple):
    """metadata: by full key. tensors: float32, by name. notes: for a person to read."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Float32]
    notes: tuple[str, ...]


def hyperparameters(config: Any, family: Family) -> Hyperparameters:
    """Of transformers' config. Raises TargetError when llama.cpp can't compute what it says."""
    _check_activation(config, family)
    head_size = _head_size(config)
    turned = RotaryMetadata({}, {}, config.max_position_embeddings) if family.architecture == "gpt2" else None
    turned = turned or rotary(config, head_size, family.factors, family.architecture == "phi3")
    found: dict[str, Any] = {
        "vocab_size": int(config.vocab_size),
        "context_length": turned.context,
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": _feed_forward(config),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        ),
        **turned.metadata,
    }
    if family.architecture == "gpt2":
        found["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    else:
        found["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
        found["attention.key_length"] = found["attention.value_length"] = head_size
    notes = list(turned.notes)
    _PECULIAR.get(family.architecture, _nothing)(config, found, head_size)
    _windows(config, family, found, notes)
    whole = {f"{family.architecture}.{key}": value for key, value in found.items()}
    return Hyperparameters(whole, turned.tensors, tuple(notes))


def _head_size(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _feed_forward(config: Any) -> int:
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(inner or 4 * config.hidden_size)


def _check_activation(config: Any, family: Family) -> None:
    names = ("hidden_activation", "hidden_act", "activation_function")
    given = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if given not in family.activation:
        raise _otherwise(f"the activation {given!r}", " or ".join(family.activation))


def _otherwise(what: str, theirs: str) -> TargetError:
    return TargetError(f"config.json asks for {what} where llama.cpp computes {theirs}; export it to onnx")


def _windows(config: Any, family: Family, found: dict[str, Any], notes: list[str]) -> None:
    """Layers that see only a part of the text, as llama.cpp is told of them, or the context cut to that."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    has = [kind == "sliding_attention" for kind in kinds] if kinds else [window is not None] * 1
    if getattr(config, "use_sliding_window", True) is False:
        has = [False]
    if family.window:
        _told_windows(window, has, family, found, notes)
        return
    if window is None or not any(has):
        return
    if found["context_length"] > window:
        found["context_length"] = int(window)
        notes.append(
            f"llama.cpp has no sliding window for {family.architecture}, so the file says that the context "
            f"is {window} tokens: up to there it computes what the model does"
        )


def _told_windows(
    window: int | None, has: Sequence[bool], family: Family, found: dict[str, Any], notes: list[str]
) -> None:
    if window is None or not any(has):
        if family.architecture == "gemma2":  # which has one whether told or not
            found["attention.sliding_window"] = found["context_length"]
        return
    found["attention.sliding_window"] = int(window)
    step = _USUAL_PATTERN[family.architecture]
    if list(has) != [index % step < step - 1 for index in range(len(has))]:
        found["attention.sliding_window_pattern"] = list(has)
        notes.append(
            "its sliding windows lie on other layers than this family's usually do: an older llama.cpp takes "
            "no notice of attention.sliding_window_pattern, and computes something else"
        )


def _nothing(config: Any, found: dict[str, Any], head_size: int) -> None:
    """Nothing is peculiar."""


def _square(config: Any, found: dict[str, Any], head_size: int) -> None:
    """Heads that together are as wide as the model: llama.cpp takes no other."""
    if head_size * config.num_attention_heads != config.hidden_size:
        raise _otherwise(
            f"heads of {head_size}", f"heads of {config.hidden_size // config.num_attention_heads}"
        )


def _phi3(config: Any, found: dict[str, Any], head_size: int) -> None:
    _square(config, found, head_size)
    found.setdefault(
        "rope.scaling.original_context_length",
        int(getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings),
    )
    found["attention.sliding_window"] = 0  # it is cut from the context instead


def _gemma(config: Any, found: dict[str, Any], head_size: int, architecture: str) -> None:
    scalar = float(config.query_pre_attn_scalar)
    usual = head_size
    if config.num_hidden_layers == _GEMMA_LAYERS_27B[architecture]:
        usual = config.hidden_size // config.num_attention_heads
    if scalar != usual:
        raise _otherwise(f"query_pre_attn_scalar {scalar:g}", f"{usual}")
    if getattr(config, "use_bidirectional_attention", None):
        raise _otherwise("attention in both directions", "attention backwards")
    attention, final = config.attn_logit_softcapping, config.final_logit_softcapping
    if architecture == "gemma3" and attention is not None:
        raise _otherwise("attn_logit_softcapping", "none in this family")
    if architecture == "gemma2" and (attention is None or final is None):
        raise _otherwise("no softcapping of logits", "it in any case")
    if attention is not None:
        found["attn_logit_softcapping"] = float(attention)
    if final is not None:
        found["final_logit_softcapping"] = float(final)


def _gemma2(config: Any, found: dict[str, Any], head_size: int) -> None:
    _gemma(config, found, head_size, "gemma2")


def _gemma3(config: Any, found: dict[str, Any], head_size: int) -> None:
    _gemma(config, found, head_size, "gemma3")
    found.setdefault("rope.freq_base_swa", 10000.0)


def _smollm3(config: Any, found: dict[str, Any], head_size: int) -> None:
    asked = list(config.no_rope_layers)
    if asked != [int((index + 1) % 4 != 0) for index in range(len(asked))]:
        raise _otherwise("other layers without rotary embeddings", "every fourth one without")


def _gpt2(config: Any, found: dict[str, Any], head_size: int) -> None:
    odd = not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx
    if odd or config.add_cross_attention:
        raise _otherwise("attention that isn't scaled by its heads' size alone", "that")


_PECULIAR = {
    "phi3": _phi3,
    "qwen2": _square,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
}
