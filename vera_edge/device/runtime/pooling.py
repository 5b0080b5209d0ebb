"""From an encoder's last hidden states to one embedding a text, as sentence-transformers makes it.

A folder of sentence-transformers says how in modules.json: a Transformer, a Pooling with a config.json of
its own, perhaps layers behind it (pooling_layers.py). Without that file sentence-transformers takes the mean
over the tokens, and so do we.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.device.runtime import pooling_layers
from vera_edge.device.runtime.pooling_layers import Layer, unit
from vera_edge.errors import BundleError
from vera_edge.storage.files import safe_join
from vera_edge.storage.json_text import read_json, read_value

MODULES, LONGEST, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_FIRST, _BEHIND = ("Transformer", "Pooling"), ("Dense", "LayerNorm", "Normalize", "Dropout")
# The flags of older versions, in the order in which several ways are put beside each other.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _weighted(hidden: Float32, weights: Float32) -> Float32:
    found: Float32 = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return found


# Hidden states (b, n, d) and the mask (b, n, 1), padding at the end, to (b, d).
_WAYS: Mapping[str, Callable[[Float32, Float32], Float32]] = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: np.where(mask > 0, hidden, np.float32(-np.inf)).max(axis=1),
    "mean": _weighted,
    "mean_sqrt_len_tokens": lambda hidden, mask: _weighted(hidden, mask) * np.sqrt(mask.sum(axis=1)),
    "weightedmean": lambda hidden, mask: _weighted(hidden, mask * mask.cumsum(axis=1)),
    "lasttoken": lambda hidden, mask: hidden[
        np.arange(len(hidden)), mask[..., 0].sum(axis=1).astype(int) - 1
    ],
}


@dataclass(frozen=True)
class Pooling:
    """ways: of cls, max, mean and so on, beside each other. normalize: to a length of 1, in the end.

    longest: the tokens of a text that count, None where only the model's positions bound them. layers: what
    the pooled vectors go through, in order. prompt: what is put before every text.
    """

    ways: tuple[str, ...] = ("mean",)
    normalize: bool = False
    longest: int | None = None
    layers: tuple[Layer, ...] = ()
    prompt: str = ""

    def embeddings(self, hidden: Float32, mask: npt.NDArray[np.int64]) -> Float32:
        """(b, ways x d) of hidden states (b, n, d) and mask (b, n), 1 where a token is."""
        weights = mask[:, :, None].astype(np.float32)
        found = np.concatenate([_WAYS[way](hidden, weights) for way in self.ways], axis=1)
        for layer in self.layers:
            found = layer(found)
        return unit(found) if self.normalize else found


def read(folder: Path, hidden: int | None = None) -> Pooling:
    """What `folder` says of a model whose hidden states have `hidden` values, where that is known.

    Raises BundleError on a module, a layer or a way of pooling that isn't known, or doesn't fit.
    """
    if not (folder / MODULES).is_file():
        return Pooling()
    ways: tuple[str, ...] = ("mean",)
    layers: list[Layer] = []
    kinds: list[str] = []
    width = hidden
    for kind, name in _modules(folder / MODULES):
        behind = "Pooling" in kinds
        if kind not in (_BEHIND if behind else _FIRST):
            place = " before a Pooling" if kind in _BEHIND else ""
            raise BundleError(
                f"{folder / MODULES} asks for the module {kind!r}{place}, which vera-edge doesn't run; it "
                f"runs {', '.join(_FIRST)}, and behind those {', '.join(_BEHIND)}"
            )
        if behind:
            layer, width = pooling_layers.read(kind, folder, name, width)
            layers.append(layer)
        elif kind == "Pooling":
            ways = _ways(safe_join(folder, f"{name}/config.json"))
            width = None if hidden is None else hidden * len(ways)
        kinds.append(kind)
    normalize = "Pooling" in kinds and kinds[-1] == "Normalize"
    limits = read_json(folder / LONGEST, BundleError) if (folder / LONGEST).is_file() else {}
    longest = limits.get("max_seq_length")
    bound = longest if type(longest) is int and longest > 0 else None
    return Pooling(ways, normalize, bound, tuple(layers[:-1] if normalize else layers), _prompt(folder))


def _prompt(folder: Path) -> str:
    """What sentence-transformers puts before every text where nothing else is asked for."""
    config = read_json(folder / PROMPTS, BundleError) if (folder / PROMPTS).is_file() else {}
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    prompt = prompts.get(name, "") if isinstance(prompts, dict) and isinstance(name, str) else ""
    if not isinstance(prompt, str):
        raise BundleError(f"{folder / PROMPTS}: the prompt {name!r} isn't a text")
    return prompt


def _modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module."""
    try:
        found = read_value(path, BundleError)
        return [(entry["type"].rpartition(".")[2], entry["path"]) for entry in found]
    except (BundleError, TypeError, KeyError, AttributeError):
        raise BundleError(f"{path} isn't a list of modules with type and path") from None


def _ways(path: Path) -> tuple[str, ...]:
    config = read_json(path, BundleError)
    if config.get("include_prompt", True) is False and _prompt(path.parent.parent):
        raise BundleError(f"{path} leaves a prompt out of the pooling, which vera-edge doesn't")
    named = config.get("pooling_mode")
    if named is None:
        named = [way for flag, way in _FLAGS.items() if config.get(flag) is True] or "mean"
    ways = named if isinstance(named, list) else [named]
    if strange := [way for way in ways if not isinstance(way, str) or way not in _WAYS]:
        raise BundleError(f"{path} asks for pooling {strange[0]!r}; vera-edge knows {', '.join(_WAYS)}")
    return tuple(ways)
