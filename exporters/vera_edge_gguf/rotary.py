"""Rotary embeddings as llama.cpp is told of them: metadata, and tensors of factors for each pair of rows.

llama.cpp divides the frequency of each pair by its factor. Source of the three ways that are scaled by
formula: transformers' modeling_rope_utils.py (llama3, longrope, yarn).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.errors import TargetError

# Between which numbers of turns yarn goes over from one frequency to the other: of the families written here
# llama.cpp reads these from no file (of its others grok and mistral3 do).
_YARN_TURNS = {"beta_fast": 32, "beta_slow": 1}


class RotaryMetadata(NamedTuple):
    """metadata: by key without the architecture. tensors: by name. notes: for a person to read.

    context: the longest sequence for which llama.cpp computes what transformers does.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Float32]
    context: int
    notes: tuple[str, ...] = ()


def rotary(config: Any, head_size: int, factors: Sequence[str], in_part: bool = False) -> RotaryMetadata:
    """Of a text model's config (transformers'). Raises TargetError for a scaling that llama.cpp lacks.

    factors: the ways to scale for which the family has a place for factors. in_part: whether it turns only a
    part of each head where it is told to.
    """
    given = dict(getattr(config, "rope_parameters", None) or {})
    full = dict(given.get("full_attention") or given)
    sliding = given.get("sliding_attention")
    partial = float(full.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1)
    if partial != 1 and not in_part:
        raise TargetError(
            f"config.json asks for rotary embeddings of {partial:g} of each head, which llama.cpp doesn't "
            "compute in this family; export it to onnx"
        )
    dimensions = int(head_size * partial)
    metadata: dict[str, Any] = {
        "rope.dimension_count": dimensions,
        "rope.freq_base": float(full.get("rope_theta", 10000.0)),
    }
    if isinstance(sliding, Mapping):
        if sliding.get("rope_type", "default") != "default":
            raise TargetError(
                "layers with a sliding window scale their rotary embeddings, which llama.cpp doesn't; export "
                "it to onnx"
            )
        metadata["rope.freq_base_swa"] = float(sliding.get("rope_theta", 10000.0))
    kind = str(full.get("rope_type", "default"))
    if kind in ("llama3", "longrope") and kind not in factors:
        raise TargetError(
            f"rotary embeddings are scaled by {kind}, for which llama.cpp has no place in this family; "
            "export it to onnx"
        )
    scaled = _scaled(full, int(config.max_position_embeddings), dimensions)
    if isinstance(sliding, Mapping) and scaled.metadata.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise TargetError(
            "yarn with an attention_factor of its own is computed in llama.cpp for layers with a sliding "
            "window too, which the model leaves as they are; export it to onnx"
        )
    return scaled._replace(metadata={**metadata, **scaled.metadata})


def _scaled(given: Mapping[str, Any], context: int, dimensions: int) -> RotaryMetadata:
    kind = str(given.get("rope_type", "default"))
    original = given.get("original_max_position_embeddings") or context
    factor = float(given.get("factor") or 1)
    if kind == "default":
        return RotaryMetadata({}, {}, context)
    if kind == "linear":
        return RotaryMetadata({"rope.scaling.type": "linear", "rope.scaling.factor": factor}, {}, context)
    if kind == "llama3":
        return RotaryMetadata(
            {}, {"rope_freqs.weight": _llama3(given, factor, original, dimensions)}, context
        )
    if kind == "yarn":
        return _yarn(given, factor, original, context)
    if kind == "longrope":
        return _longrope(given, original, context, dimensions)
    if kind == "dynamic":
        note = (
            f"llama.cpp doesn't grow rotary embeddings with the text (rope_type dynamic), so the file says "
            f"that the context is {original} tokens, up to which nothing is scaled"
        )
        return RotaryMetadata({}, {}, int(original), (note,))
    raise TargetError(
        f"config.json scales rotary embeddings by {kind!r}, which llama.cpp isn't told of; export it to onnx"
    )


def _llama3(given: Mapping[str, Any], factor: float, original: float, dimensions: int) -> Float32:
    """Long waves are stretched by the factor, short ones not at all, those between in part."""
    base = float(given.get("rope_theta", 10000.0))
    waves = 2 * np.pi * base ** (np.arange(0, dimensions, 2) / dimensions)
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _yarn(given: Mapping[str, Any], factor: float, original: float, context: int) -> RotaryMetadata:
    if given.get("mscale") or given.get("mscale_all_dim") or given.get("truncate") is False:
        raise TargetError(
            "yarn with mscale, or without truncation, is computed otherwise in llama.cpp; export it to onnx"
        )
    for name, usual in _YARN_TURNS.items():
        if (asked := given.get(name) or usual) != usual:
            raise TargetError(
                f"yarn with a {name} of {asked:g} is computed with {usual} in llama.cpp; export it to onnx"
            )
    if given.get("factor") is None:
        factor = context / original
    metadata: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }
    if given.get("attention_factor") is not None:
        usual_attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        metadata["rope.scaling.attn_factor"] = float(given["attention_factor"]) / usual_attention
    return RotaryMetadata(metadata, {}, max(context, int(original * factor)))


def _longrope(given: Mapping[str, Any], original: float, context: int, dimensions: int) -> RotaryMetadata:
    found = {}
    for length in ("long", "short"):
        factors = np.asarray(given[f"{length}_factor"], np.float32)
        if factors.shape != (dimensions // 2,):
            raise TargetError(
                f"config.json has {factors.size} {length} factors for {dimensions // 2} pairs of rows"
            )
        found[f"rope_factors_{length}.weight"] = factors
    stretch = float(given.get("factor") or context / original)
    attention = given.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    note = (
        f"llama.cpp turns keys by the long factors whenever its context is opened with more than {original} "
        "tokens, also while the text is short: open it with no more than the text needs"
    )
    metadata = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.attn_factor": float(attention),
    }
    return RotaryMetadata(metadata, found, context, (note,))
