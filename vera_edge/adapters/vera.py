"""Reads a VeRA adapter as PEFT writes it: config, vectors by module, saved projections, a digest.

PEFT 0.12 to 0.21 are read. Their files differ in what they may hold beside the vectors: `peft_version` (from
0.18.1), trained biases (from 0.21), copies of `modules_to_save`. Any tensor that isn't understood is refused,
for a tensor that is left out would change the model without a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vera_edge.adapters import wrapper_names
from vera_edge.adapters.projection import MAX_SIDE
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, CheckpointError
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json, read_json
from vera_edge.storage.tensors import FLOATS, RawTensor, TensorFolder

CONFIG_NAME = "adapter_config.json"
_UNGATHERED = (
    "it was saved without gathering its parts (DeepSpeed ZeRO-3, FSDP): save it with "
    "stage3_gather_16bit_weights_on_model_save, or from a full state dict"
)
# PEFT stores these whole when the vocabulary was resized or when they are targets themselves.
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "word_embeddings", "wte", "embed_in", "embed_out"})
_HEAD = "predictions.decoder"  # of a BERT


@dataclass(frozen=True, eq=False)
class LambdaVectors:
    """What VeRA trained for one linear layer: `lambda_b` (out_features,) and `lambda_d` (rank,), float32."""

    lambda_b: Float32
    lambda_d: Float32


@dataclass(frozen=True, eq=False)
class Adapter:
    """A VeRA adapter, read and checked.

    vectors: by module, named as in the base checkpoint ("model.layers.0.self_attn.q_proj").
    saved: A (rank, in_max) and B (out_max, rank) when the folder holds them.
    biases: trained biases by module, float32, which replace the base's.
    modules_to_save: tensors that replace the base's, by the name they have there.
    digest: hex SHA-256 of the tensors and of the facts that change what the adapter computes: rank, seed,
        bias and PEFT version. Names and paths aren't among them.
    as_trained: the same under PEFT's names, where the base at hand has others (see `alignment`).
    notes: sentences a person should read about how it was saved.
    """

    path: Path
    name: str
    base_name: str | None
    rank: int
    seed: int
    vectors: Mapping[str, LambdaVectors]
    saved: tuple[Float32, Float32] | None
    biases: Mapping[str, Float32]
    modules_to_save: Mapping[str, RawTensor]
    config: Mapping[str, Any]
    peft_version: str | None
    digest: str
    as_trained: Adapter | None = None
    notes: tuple[str, ...] = ()


class WeightedAdapter(NamedTuple):
    """An adapter and the weight that scales its delta."""

    adapter: Adapter
    weight: float


@dataclass
class _Parts:
    """The tensors of an adapter file, sorted by their role."""

    lambda_b: dict[str, Float32] = field(default_factory=dict)
    lambda_d: dict[str, Float32] = field(default_factory=dict)
    projections: dict[str, Float32] = field(default_factory=dict)
    biases: dict[str, Float32] = field(default_factory=dict)
    modules_to_save: dict[str, RawTensor] = field(default_factory=dict)


def read(path: Path) -> Adapter:
    """Read the adapter in folder `path`.

    Raises AdapterError when it can't be read, isn't VeRA, contradicts itself, or holds NaN or infinities.
    """
    config = _read_config(path)
    rank = _integer(config, "r", path)
    seed = _integer(config, "projection_prng_key", path)
    if not 1 <= rank <= MAX_SIDE:
        raise AdapterError(f"{path / CONFIG_NAME} gives rank r = {rank}; it must be from 1 to {MAX_SIDE}")
    folder = TensorFolder.open(path, "adapter_model", AdapterError)
    names, notes = wrapper_names.plain_names(folder, path)
    parts, tensors_digest = _sort_tensors(folder, names, config, path)
    vectors = _pair(parts, rank, path)
    version = _text_or_none(config, "peft_version", path)
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "vera_only"):
        raise AdapterError(f"{path / CONFIG_NAME}: bias is {bias!r}, not none, all or vera_only")
    return Adapter(
        path=path,
        name=_plain_name(path),
        base_name=_text_or_none(config, "base_model_name_or_path", path),
        rank=rank,
        seed=seed,
        vectors=vectors,
        saved=_saved(parts, config, vectors, rank, path),
        biases=parts.biases,
        modules_to_save=parts.modules_to_save,
        config=config,
        peft_version=version,
        digest=sha256_bytes(canonical_json([rank, seed, bias, version, tensors_digest])),
        notes=(*folder.notes, *notes),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterError(f"{path} isn't a folder; give the folder that holds {CONFIG_NAME}")
    if not (path / CONFIG_NAME).exists():
        nested = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_NAME}"))
        hint = f"; it has adapters in subfolders: give one of {', '.join(nested)}" if nested else ""
        raise AdapterError(f"{path} holds no {CONFIG_NAME}, so it isn't a PEFT adapter{hint}")
    config = read_json(path / CONFIG_NAME, AdapterError)
    method = config.get("peft_type")
    if method != "VERA":
        raise AdapterError(f"{path} holds a PEFT adapter of type {method}; vera-edge takes VERA only")
    return config


def _integer(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int:
        raise AdapterError(f"{path / CONFIG_NAME}: {key} is {value!r} where an integer belongs")
    return value


def _text_or_none(config: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{path / CONFIG_NAME}: {key} is {value!r} where a text belongs")
    return value or None


def _sort_tensors(
    folder: TensorFolder, names: Mapping[str, str], config: Mapping[str, Any], path: Path
) -> tuple[_Parts, str]:
    """Give every tensor its role, and digest all of them in the order of their names."""
    parts, state = _Parts(), hashlib.sha256()
    for name, key in sorted(names.items()):
        try:
            raw = folder.read(key)
        except CheckpointError as cause:
            raise AdapterError(str(cause)) from None
        if not raw.data.size:
            raise AdapterError(f"tensor {key} of {path} is empty (shape {list(raw.shape)}); {_UNGATHERED}")
        state.update(f"{name} {raw.dtype} {list(raw.shape)}\n".encode())
        state.update(raw.data.data)
        _check_finite(key, raw, path)
        _place(parts, name, raw, config, path)
    return parts, state.hexdigest()


def _check_finite(key: str, raw: RawTensor, path: Path) -> None:
    if raw.dtype in FLOATS and not np.isfinite(raw.float32()).all():
        raise AdapterError(
            f"tensor {key} of {path} holds NaN or infinite values; its training diverged: use an earlier one"
        )


def _place(parts: _Parts, key: str, raw: RawTensor, config: Mapping[str, Any], path: Path) -> None:
    name = key.removeprefix(wrapper_names.PEFT_PREFIX)
    module, _, kind = name.rpartition(".")
    if kind == "vera_lambda_b":
        parts.lambda_b[module] = _floats(key, raw, 1, path)
    elif kind == "vera_lambda_d":
        parts.lambda_d[module] = _floats(key, raw, 1, path)
    elif kind in ("vera_A", "vera_B") and (module in ("", "base_model") or name != key):
        _place_projection(parts, key, kind, _floats(key, raw, 2, path), path)
    elif ".original_module." in name:
        pass  # the base's own tensor, which PEFT 0.21 writes beside a trained copy by mistake
    elif _is_saved_module(module, config):
        parts.modules_to_save[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = raw
    elif kind == "bias" and config.get("bias") in ("all", "vera_only"):
        parts.biases[module.removesuffix(".base_layer")] = _floats(key, raw, 1, path)
    else:
        advice = f"; {_UNGATHERED}" if "flat_param" in kind else ""
        raise AdapterError(f"tensor {key} of {path} isn't part of a VeRA adapter as PEFT writes it{advice}")


def _place_projection(parts: _Parts, key: str, kind: str, values: Float32, path: Path) -> None:
    """A state_dict() holds what all layers share once for each of them."""
    known = parts.projections.setdefault(kind, values)
    if not np.array_equal(known, values):
        raise AdapterError(f"{key} of {path} differs from another {kind} there; all layers share one")


def _is_saved_module(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT stores this module whole: `modules_to_save` names it or a parent, or it's an embedding.

    PEFT takes a name as an ending: "norm" also names `layers.0.input_layernorm`.
    """
    embeds = not _EMBEDDINGS.isdisjoint(module.split(".")) or module.endswith(_HEAD)
    return embeds or lies_in(module, named_whole(config))


def named_whole(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `modules_to_save`."""
    named = config.get("modules_to_save")
    return tuple(name for name in named if name and isinstance(name, str)) if isinstance(named, list) else ()


def lies_in(module: str, endings: tuple[str, ...]) -> bool:
    """Whether a module or one that it lies in has one of these endings."""
    parts = module.split(".")
    return any(".".join(parts[: count + 1]).endswith(endings) for count in range(len(parts)))


def _floats(key: str, raw: RawTensor, dimensions: int, path: Path) -> Float32:
    if raw.dtype not in FLOATS or len(raw.shape) != dimensions:
        raise AdapterError(
            f"tensor {key} of {path} is {raw.dtype} of shape {list(raw.shape)} where floats in "
            f"{dimensions} dimension{'s' * (dimensions > 1)} belong"
        )
    return raw.float32()


def _pair(parts: _Parts, rank: int, path: Path) -> dict[str, LambdaVectors]:
    vectors = {}
    for module in sorted(parts.lambda_b.keys() | parts.lambda_d.keys()):
        for kind, found in (("lambda_b", parts.lambda_b), ("lambda_d", parts.lambda_d)):
            if module not in found:
                raise AdapterError(
                    f"{path} holds no vera_{kind} for {module}, only the other half of the pair"
                )
        pair = LambdaVectors(parts.lambda_b[module], parts.lambda_d[module])
        if pair.lambda_d.size != rank:
            raise AdapterError(
                f"vera_lambda_d of {module} in {path} has {pair.lambda_d.size} values, but the config gives "
                f"rank r = {rank}"
            )
        vectors[module] = pair
    if not vectors:
        raise AdapterError(
            f"{path} holds no VeRA vectors; it was saved before any layer was adapted, or {_UNGATHERED}"
        )
    return vectors


def _saved(
    parts: _Parts, config: Mapping[str, Any], vectors: Mapping[str, LambdaVectors], rank: int, path: Path
) -> tuple[Float32, Float32] | None:
    found = parts.projections
    if not found:
        if config.get("save_projection"):
            raise AdapterError(
                f"{path} should hold its projections (save_projection is true) and doesn't; set "
                "save_projection to false in its config if they were removed on purpose"
            )
        return None
    if len(found) == 1:
        raise AdapterError(f"{path} holds {next(iter(found))} without its other half")
    a, b = found["vera_A"], found["vera_B"]
    widest = max(pair.lambda_b.size for pair in vectors.values())
    if a.shape[0] != rank or b.shape[1] != rank or b.shape[0] < widest:
        raise AdapterError(
            f"saved projections of {path} have shapes {list(a.shape)} and {list(b.shape)}, which don't fit "
            f"rank {rank} and {widest} output features"
        )
    return a, b


def _plain_name(path: Path) -> str:
    """The folder's name with only characters that are safe in a file name on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).strip(".-") or "adapter"
