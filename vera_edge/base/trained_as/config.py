"""The config.json of a base as it was loaded: its dtype, and how it was quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vera_edge.base.trained_as.spec import DTYPES, TrainedAs
from vera_edge.errors import CheckpointError
from vera_edge.storage.tensors import FLOATS, TensorFolder

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def loading_dtype(spec: TrainedAs, config: Mapping[str, Any], tensors: TensorFolder) -> str:
    """The dtype that transformers loads a base in, by torch's name: the one asked for, else config.json's.

    Where that names none, the first float tensor's. Raises CheckpointError when it's none of DTYPES.
    """
    found = spec.dtype or config.get("dtype") or config.get("torch_dtype")
    if found is None:
        found = next((TORCH_NAMES[info.dtype] for info in tensors.values() if info.dtype in FLOATS), None)
    name = str(found).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(
            f"the base would be loaded as {name}, by its config.json, which bitsandbytes doesn't quantize; "
            f"say what it was loaded as with dtype= ({', '.join(DTYPES)})"
        )
    return name


def loaded_config(config: Mapping[str, Any], spec: TrainedAs, dtype: str) -> dict[str, Any]:
    """`config` of a float base, for the base as `spec` loads it."""
    changed = without_local_code(with_dtype(config, dtype))
    if "torch_dtype" not in changed:
        changed["dtype"] = dtype
    quantization = spec.quantization_config()
    return changed if quantization is None else changed | {"quantization_config": quantization}


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with every dtype it names, those of nested models included, set."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = with_dtype(value, dtype) if isinstance(value, Mapping) else value
    return changed


def without_local_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the names of classes in the folder's own code: it is never copied."""
    named = config.get("auto_map")
    local = isinstance(named, Mapping) and any("--" not in str(value) for value in named.values())
    return {key: value for key, value in config.items() if not (local and key == "auto_map")}


def without_kernels(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what says how a runtime computes, those of nested models included.

    transformers saves no such thing, but reads it, and takes the name of a repository for code to fetch and
    run.
    """
    return {
        key: without_kernels(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not key.endswith(("attn_implementation", "experts_implementation", "_implementation_internal"))
    }
