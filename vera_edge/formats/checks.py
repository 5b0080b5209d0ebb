"""Checks that every quantized format makes of a checkpoint's config and headers before it believes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.errors import CheckpointError, FormatError, PlanError, VeraEdgeError
from vera_edge.storage.tensors import TensorFolder

SCALES = frozenset({"F16", "BF16", "F32"})


_KEYS = ("quantization_config", "compression_config")


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a config.json, empty when there is none.

    Older compressed-tensors checkpoints call it `compression_config`; multimodal ones keep it with the text
    model, or with a model within a model. Raises CheckpointError when two of them differ.
    """
    told: Mapping[str, Any] = {}
    for holder in _holders(config):
        for key in _KEYS:
            found = holder.get(key)
            if found is not None and not isinstance(found, Mapping):
                raise CheckpointError(f"{key} of config.json is {str(found)[:80]!r} where an object belongs")
            if found and told and found != told:
                raise CheckpointError(
                    "config.json describes two quantizations that differ; one is for other weights"
                )
            told = told or found or {}
    return told


def _holders(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and the configs of the models within it."""
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _KEYS:
            yield from _holders(value)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its quantization, wherever that stands, and without what held nothing else."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _KEYS:
            continue
        kept[key] = without_quantization(value) if isinstance(value, Mapping) else value
        if value and kept[key] == {}:
            del kept[key]
    return kept


def with_quantization(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with its quantization replaced by `changed`, wherever that stands."""
    return {
        key: (dict(changed) if value else value)
        if key in _KEYS
        else (with_quantization(value, changed) if isinstance(value, Mapping) else value)
        for key, value in config.items()
    }


def method(config: Mapping[str, Any]) -> str | None:
    """The quantization method config.json names, None for an unquantized model."""
    found = quantization(config)
    name = found.get("quant_method")
    if name is None and ("load_in_4bit" in found or "load_in_8bit" in found):
        return "bitsandbytes"
    if name is None and "config_groups" in found:
        return "compressed-tensors"
    if found and not isinstance(name, str):
        raise FormatError(f"quantization_config of config.json names no quant_method, but {name!r}")
    return name


def named(config: Mapping[str, Any], path: Path, error: type[VeraEdgeError]) -> None:
    """Raise `error` unless model_type and architectures, where config.json has them, are names."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str | None):
        raise error(f"{path}: model_type is {str(model_type)[:80]!r} where a name belongs")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise error(f"{path}: architectures is {str(architectures)[:80]!r} where a list of names belongs")


def whole(value: Any, known: Collection[int]) -> bool:
    """Whether a value of a config is one of some whole numbers: Python takes 4.0 and True for numbers too."""
    return type(value) is int and value in known


def roles(tensors: TensorFolder, module: str, kind: str, suffixes: Mapping[str, str]) -> dict[str, str]:
    """The tensor of each role (role -> suffix); raises CheckpointError when one is missing."""
    found = {role: f"{module}{suffix}" for role, suffix in suffixes.items()}
    for role, name in found.items():
        if name not in tensors:
            raise CheckpointError(f"{module} is stored as {kind}, but its tensor {name} ({role}) is missing")
    return found


def expect(
    tensors: TensorFolder, name: str, dtypes: Collection[str], shape: tuple[int, ...], why: str
) -> None:
    """Raise CheckpointError unless a tensor has one of the dtypes and the shape; `why` tells where
    that's from.
    """
    info = tensors[name]
    if info.dtype not in dtypes:
        raise CheckpointError(
            f"{name} in {info.file} has dtype {info.dtype} where {' or '.join(sorted(dtypes))} belongs"
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{name} in {info.file} has shape {list(info.shape)}, but {why} asks for {list(shape)}"
        )


def matrix(tensors: TensorFolder, name: str) -> tuple[int, int]:
    """The shape of a 2-D tensor; raises CheckpointError when it isn't one, or is empty."""
    info = tensors[name]
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(f"{name} in {info.file} has shape {list(info.shape)} where a matrix belongs")
    return info.shape[0], info.shape[1]


def finite(tensors: TensorFolder, name: str) -> Float32:
    """A tensor of scales or zeros as float32; raises CheckpointError on NaN and infinities."""
    scales = tensors.float32(name)
    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{name} in {tensors[name].file} holds NaN or infinite values; the checkpoint is damaged"
        )
    return scales


def groups(
    inside: int,
    size: Any,
    what: str,
    error: type[CheckpointError | PlanError] = CheckpointError,
    short: bool = False,
) -> int:
    """How many groups of `size` inputs (-1: one for all) there are; raises `error` when it doesn't divide.

    short: let the last group be short instead.
    """
    if type(size) is not int or size < -1 or size == 0:
        raise error(f"{what}: group size {size!r} isn't a positive number or -1")
    size = inside if size == -1 else size
    if inside % size and not short:
        raise error(f"{what}: a group size of {size} doesn't divide its {inside} inputs")
    return -(-inside // size)


def known_options(given: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`given` over `defaults`; raises PlanError on an option that isn't among them, or of another type."""
    for key, value in given.items():
        if key not in defaults:
            raise PlanError(f"{name} takes no option {key!r}; it takes {', '.join(defaults)}")
        if defaults[key] is not None and type(value) is not type(defaults[key]):
            raise PlanError(
                f"option {key} of {name} is {value!r} where {type(defaults[key]).__name__} belongs"
            )
    return {**defaults, **given}
