"""VeRA: two vectors for each layer, and projections that all layers share, as PEFT 0.12 to 0.21 has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vera_edge.adapters.adapter import VERA, Adapter, LayerChange
from vera_edge.adapters.folder import UNGATHERED, AdapterFolder
from vera_edge.adapters.method import Method
from vera_edge.adapters.projection import MAX_SIDE
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, PlanError
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json

_OWN = frozenset({"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"})
_BIASES = ("all", "vera_only")


@dataclass(frozen=True, eq=False)
class LambdaVectors(LayerChange):
    """What VeRA trained for one linear layer: `lambda_b` (out_features,) and `lambda_d` (rank,), float32."""

    lambda_b: Float32
    lambda_d: Float32

    @property
    def arrays(self) -> Mapping[str, Float32]:
        """Both vectors."""
        return {"vera_lambda_b": self.lambda_b, "vera_lambda_d": self.lambda_d}

    @property
    def is_zero(self) -> bool:
        """Whether lambda_b was never trained."""
        return not self.lambda_b.any()

    @property
    def out_features(self) -> int:
        """The layer's outputs."""
        return self.lambda_b.size


def vectors_of(adapter: Adapter) -> dict[str, LambdaVectors]:
    """A VeRA adapter's vectors by layer. Raises PlanError for another method's."""
    found = {name: pair for name, pair in adapter.vectors.items() if isinstance(pair, LambdaVectors)}
    if len(found) != len(adapter.vectors):
        raise PlanError(f"{adapter.path} isn't a VeRA adapter, and this is for VeRA's vectors")
    return found


@dataclass
class _Parts:
    """The tensors of a VeRA adapter's file, sorted by their role."""

    lambda_b: dict[str, Float32] = field(default_factory=dict)
    lambda_d: dict[str, Float32] = field(default_factory=dict)
    projections: dict[str, Float32] = field(default_factory=dict)


def _read(folder: AdapterFolder) -> Adapter:
    path, config = folder.path, folder.config
    rank, seed = folder.integer("r"), folder.integer("projection_prng_key")
    if not 1 <= rank <= MAX_SIDE:
        raise folder.refuse(f"gives rank r = {rank}; it must be from 1 to {MAX_SIDE}")
    parts, own = _Parts(), set[str]()
    for name in folder.tensors:
        if _place(parts, name, folder):
            own.add(name)
    others = folder.others(own.__contains__, "VeRA", _BIASES)
    vectors = _pair(parts, rank, folder)
    version = folder.text_or_none("peft_version")
    bias = config.get("bias", "none")
    return Adapter(
        path=path,
        name=folder.name,
        base_name=folder.text_or_none("base_model_name_or_path"),
        rank=rank,
        seed=seed,
        vectors=vectors,
        saved=_saved(parts, folder, vectors, rank),
        biases=others.biases,
        modules_to_save=others.modules_to_save,
        config=config,
        peft_version=version,
        digest=sha256_bytes(canonical_json([rank, seed, bias, version, folder.digest])),
        notes=folder.notes,
    )


_DOES = "adds diag(lambda_b) B diag(lambda_d) A to the weight, A and B drawn and shared by all layers"
METHOD = Method(VERA, "VeRA", _OWN.__contains__, _read, branches=True, does=_DOES)


def _place(parts: _Parts, name: str, folder: AdapterFolder) -> bool:
    """Take a tensor of VeRA's own; whether it is one."""
    module, _, kind = name.rpartition(".")
    if kind == "vera_lambda_b":
        parts.lambda_b[module] = folder.floats(name, 1)
    elif kind == "vera_lambda_d":
        parts.lambda_d[module] = folder.floats(name, 1)
    elif kind in ("vera_A", "vera_B") and (module in ("", "base_model") or name in folder.prefixed):
        # A state_dict() holds what all layers share once for each of them.
        values = folder.floats(name, 2)
        if not np.array_equal(parts.projections.setdefault(kind, values), values):
            key = folder.keys[name]
            raise AdapterError(
                f"{key} of {folder.path} differs from another {kind} there; all layers share one"
            )
    else:
        return False
    return True


def _pair(parts: _Parts, rank: int, folder: AdapterFolder) -> dict[str, LambdaVectors]:
    vectors, path = {}, folder.path
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
            f"{path} holds no VeRA vectors; it was saved before any layer was adapted, or {UNGATHERED}"
        )
    return vectors


def _saved(
    parts: _Parts, folder: AdapterFolder, vectors: Mapping[str, LambdaVectors], rank: int
) -> tuple[Float32, Float32] | None:
    found, path = parts.projections, folder.path
    if not found:
        if folder.config.get("save_projection"):
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
