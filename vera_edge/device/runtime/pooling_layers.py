"""The layers that sentence-transformers puts behind the pooling: Dense, LayerNorm, Normalize, in numpy.

Each has a folder of its own in the model's: a config.json, and a small model.safetensors. What isn't known to
the last setting is refused: an embedding of another making is of no use to anybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.arrays import Float32
from vera_edge.errors import BundleError
from vera_edge.storage.files import safe_join
from vera_edge.storage.json_text import read_json
from vera_edge.storage.tensors import TensorFolder

# Embeddings (b, d) to embeddings (b, e).
Layer = Callable[[Float32], Float32]

_SENTENCE = "sentence_embedding"  # what a module reads and writes
_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's


def unit(vectors: Float32) -> Float32:
    """Each row at a length of 1; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def _sigmoid(x: Float32) -> Float32:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


def _gelu(x: Float32) -> Float32:
    erf = np.vectorize(math.erf, otypes=[np.float32])
    found: Float32 = x * np.float32(0.5) * (1 + erf(x / np.float32(math.sqrt(2))))
    return found


# By the class in torch.nn.
_ACTIVATIONS: Mapping[str, Layer] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, np.float32(0)),
    "Sigmoid": _sigmoid,
    "SiLU": lambda x: x * _sigmoid(x),
    "GELU": _gelu,
}


def read(kind: str, folder: Path, name: str, width: int | None) -> tuple[Layer, int | None]:
    """The layer of a module of this kind in `folder / name`, and the width of what it gives.

    width: of what it is given, where that is known. Raises BundleError on a kind, a setting or a weight that
    isn't known, or doesn't fit.
    """
    if kind == "Normalize":
        _settings(folder, name, kind, {})
        return unit, width
    if kind == "Dropout":  # of training only
        return _ACTIVATIONS["Identity"], width
    if kind == "LayerNorm":
        return _norm(folder, name, width)
    return _dense(folder, name, width)


def _settings(folder: Path, name: str, kind: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """A module's config.json. known: its settings that change what it computes, and what they may be."""
    path = safe_join(folder, f"{name}/config.json") if name else folder / "config.json"
    if kind == "Normalize" and not path.is_file():
        return {}
    config = read_json(path, BundleError)
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, _SENTENCE) not in (_SENTENCE, None):
            raise BundleError(
                f"{path}: {kind} works on {config[key]!r}; vera-edge runs it on embeddings alone"
            )
    for key, allowed in known.items():
        if key in config and config[key] not in allowed:
            raise BundleError(f"{path}: vera-edge runs no {kind} with {key} {config[key]!r}")
    return config


def _weights(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float32]:
    """A module's tensors, which are these and no others."""
    where = folder / name
    tensors = TensorFolder.open(where, error=BundleError)
    found = {key: tensors[key].shape for key in tensors}
    if found != dict(shapes):
        raise BundleError(
            f"{where / 'model.safetensors'} holds {found}, and its config.json asks for {dict(shapes)}"
        )
    values = {key: tensors.float32(key) for key in shapes}
    if not all(np.isfinite(value).all() for value in values.values()):
        raise BundleError(f"{where / 'model.safetensors'} holds NaN or infinity; copy it again")
    return values


def _size(config: Mapping[str, Any], key: str, where: Path) -> int:
    found = config.get(key)
    if type(found) is not int or not 0 < found < 1 << 20:
        raise BundleError(f"{where / 'config.json'}: {key} is {found!r} where a number of features belongs")
    return found


def _check_width(width: int | None, size: int, where: Path) -> None:
    if width is not None and width != size:
        raise BundleError(f"{where} takes embeddings of {size} values, and gets {width}")


def _dense(folder: Path, name: str, width: int | None) -> tuple[Layer, int]:
    config, where = _settings(folder, name, "Dense", {"use_residual": (False,)}), folder / name
    inside, out = _size(config, "in_features", where), _size(config, "out_features", where)
    _check_width(width, inside, where)
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(path.rpartition(".")[2]) if path.startswith("torch.nn.") else None
    if activation is None:
        raise BundleError(
            f"{where / 'config.json'}: vera-edge knows no activation {path!r}, only {', '.join(_ACTIVATIONS)}"
        )
    biased = config.get("bias", True) is not False
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (out, inside)}
    values = _weights(folder, name, shapes | ({"linear.bias": (out,)} if biased else {}))
    weight, bias = values["linear.weight"].T, values.get("linear.bias", np.float32(0))
    chosen = activation
    return lambda x: chosen((x @ weight + bias).astype(np.float32, copy=False)), out


def _norm(folder: Path, name: str, width: int | None) -> tuple[Layer, int]:
    config, where = _settings(folder, name, "LayerNorm", {}), folder / name
    size = _size(config, "dimension", where)
    _check_width(width, size, where)
    values = _weights(folder, name, {"norm.weight": (size,), "norm.bias": (size,)})

    def norm(x: Float32) -> Float32:
        centred = x - x.mean(axis=1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=1, keepdims=True) + _EPSILON)
        found: Float32 = centred / scale * values["norm.weight"] + values["norm.bias"]
        return found

    return norm, size
