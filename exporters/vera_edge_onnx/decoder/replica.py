"""A small copy of a model: the same config fields, few layers, small bounds, random weights.

Where a window or a rotary embedding's original length is too long to run, what the graph's builder makes of
it is seen on such a copy: its code doesn't look at sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from vera_edge.errors import TargetError
from vera_edge.quiet import first_line, quiet
from vera_edge.storage import side_files

_VOCABULARY, _INTERMEDIATE = 211, 72
_WINDOW, _ORIGINAL, _CONTEXT = 12, 24, 96  # tokens
_SEED = 7


def shrunk(config: Any) -> Any:
    """The config of the copy. config: of a text model, as transformers reads it."""
    given = config.to_dict()
    count, layers = int(given["num_hidden_layers"]), _representatives(given)
    small = {
        key: [value[layer] for layer in layers] if _is_by_layer(key, value, count) else value
        for key, value in given.items()
    }
    small |= _sizes(config)
    small |= {"num_hidden_layers": len(layers), "vocab_size": _VOCABULARY, "dtype": "float32"}
    small |= {key: index for index, key in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))}
    small.pop("quantization_config", None)
    if given.get("sliding_window"):
        small["sliding_window"] = _WINDOW
    context = int(given["max_position_embeddings"])
    original = _original(given)
    ratio = context / original if original else 1.0
    small["max_position_embeddings"] = round(_ORIGINAL * ratio) if original else _CONTEXT
    if original:
        small["rope_parameters"] = _with_original(given["rope_parameters"])
        if "original_max_position_embeddings" in given:
            small["original_max_position_embeddings"] = _ORIGINAL
    elif _is_dynamic(given.get("rope_parameters")):
        small["max_position_embeddings"] = _ORIGINAL
    try:
        return type(config).from_dict(small)
    except (StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as cause:
        raise _cannot(type(config).__name__, cause) from cause


def _cannot(what: str, cause: Exception) -> TargetError:
    return TargetError(
        f"{what} can't be checked past its window or its rotary embedding's original length, for no small "
        f"copy of the model can be made: {first_line(cause)}"
    )


def _representatives(given: Mapping[str, Any]) -> list[int]:
    """Layers that show every combination of what the config says by layer; two where it says nothing."""
    count = int(given["num_hidden_layers"])
    lists = [value for key, value in given.items() if _is_by_layer(key, value, count)]
    first: dict[str, int] = {}
    for layer in range(count):
        first.setdefault(repr([values[layer] for values in lists]), layer)
    chosen = sorted(first.values())
    return chosen if len(chosen) > 1 else list(range(min(2, count)))


def _is_by_layer(key: str, value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and not key.endswith(("_id", "_ids", "_index"))


def _sizes(config: Any) -> dict[str, int]:
    """Few heads of the same size, in groups where there were groups."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    small_groups = min(groups, 2)
    small_heads = small_groups * min(heads // groups, 4)
    found = {
        "num_attention_heads": small_heads,
        "hidden_size": small_heads * size,
        "intermediate_size": _INTERMEDIATE,
    }
    return found | ({"num_key_value_heads": small_groups} if hasattr(config, "num_key_value_heads") else {})


def _original(given: Mapping[str, Any]) -> int | None:
    """The length before scaling, where the config names one."""
    parameters = given.get("rope_parameters") or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    found = [each.get("original_max_position_embeddings") for each in nested]
    named = [int(each) for each in found if each] or [int(given.get("original_max_position_embeddings") or 0)]
    return max(named) or None


def _with_original(parameters: Mapping[str, Any]) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    changed = {
        name: _with_original(value) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
    }
    return changed | ({key: _ORIGINAL} if key in changed else {})


def _is_dynamic(parameters: Any) -> bool:
    if not isinstance(parameters, Mapping):
        return False
    return (
        any(_is_dynamic(value) for value in parameters.values()) or parameters.get("rope_type") == "dynamic"
    )


def write(config: Any, architecture: str, tokenizer: Path, folder: Path) -> Any:
    """Write the copy to `folder`, with the tokenizer's files of another one, and return it in float32.

    Raises TargetError when transformers can't make it.
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            model = getattr(transformers, architecture)(config).float().eval()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as cause:
            raise _cannot(architecture, cause) from cause
        _randomize(model)
        model.save_pretrained(folder)
    side_files.copy(tokenizer, folder, [name for name in side_files.find(tokenizer) if _is_tokenizers(name)])
    return model


def _is_tokenizers(name: str) -> bool:
    return name in side_files.TOKENIZER_FILES


def _randomize(model: Any) -> None:
    """Weights under which each part shows: attention that prefers, norms and biases that aren't neutral."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
