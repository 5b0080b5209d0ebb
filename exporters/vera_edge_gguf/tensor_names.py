"""What llama.cpp calls each tensor, and how it orders its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from vera_edge.errors import TargetError
from vera_edge_gguf.families import Family

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and tables, not weights
Rows = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Named:
    """A tensor of the file: its name there, the checkpoint's, and the heads whose rows are interleaved."""

    name: str
    source: str
    heads: int = 0

    def rows(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`values` (out, ...) in llama.cpp's order: a head's two halves row by row in turn."""
        if not self.heads:
            return values
        halves = values.reshape(self.heads, 2, values.shape[0] // self.heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def named(sources: Iterable[str], config: Any, family: Family) -> tuple[Named, ...]:
    """Every tensor of a checkpoint, in llama.cpp's order of layers.

    sources: the checkpoint's names. Raises TargetError for a tensor that llama.cpp has no place for.
    """
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    table = gguf.get_tensor_name_map(architecture, int(config.num_hidden_layers))
    heads = _heads(config) if family.interleaved else {}
    found = []
    for source in sources:
        if source.endswith(_IGNORED):
            continue
        name = table.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None or not _has_place(name, family):
            raise TargetError(
                f"llama.cpp has no place for the tensor {source} in a {family.architecture} model; export "
                "it to onnx"
            )
        if family.tied and name == HEAD:
            raise TargetError(
                f"llama.cpp's {family.architecture} takes the embedding as its output head, and this model "
                "has a head of its own; export it to onnx"
            )
        found.append(Named(name, source, heads.get(name.split(".")[2] if name.startswith("blk.") else "", 0)))
    return tuple(sorted(found, key=_order))


def by_module(tensors: Iterable[Named]) -> dict[str, Named]:
    """Weights by the module that they are of."""
    return {tensor.source.removesuffix(".weight"): tensor for tensor in tensors}


def _heads(config: Any) -> Mapping[str, int]:
    queries = int(config.num_attention_heads)
    return {"attn_q": queries, "attn_k": int(getattr(config, "num_key_value_heads", None) or queries)}


def _has_place(name: str, family: Family) -> bool:
    if not name.endswith(".bias") or "norm" in name:
        return True
    return name.startswith("blk.") and name.split(".")[2] in family.biases


def _order(tensor: Named) -> tuple[int, int, str]:
    """The embedding, the layers in turn, what comes after them."""
    parts = tensor.name.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), tensor.name
    return (2 if parts[0].startswith("output") else 0), 0, tensor.name
