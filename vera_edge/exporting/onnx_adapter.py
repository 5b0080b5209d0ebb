"""Packs an adapter's vectors for a branch bundle, as the `.onnx_adapter` that ONNX Runtime swaps in.

ONNX Runtime checks neither that a file brings every vector nor whose they are, so what doesn't belong to the
bundle's base, projections or layers is refused here, with the field that differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import LORA, VERA, Adapter
from vera_edge.adapters.projection import Projections, ProjectionSpec, stream_digest
from vera_edge.adapters.vera import vectors_of
from vera_edge.arrays import Float32
from vera_edge.base.overlay import digest_of
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import MismatchError, OutputError, PlanError
from vera_edge.exporting import lora_pairs
from vera_edge.exporting.float_range import stored
from vera_edge.storage.files import check_output, sha256_bytes, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.trained import alignment

ADAPTER_VERSION = 1
# The graph's inputs: every module's lambda_b in a row, and every module's lambda_d.
LAMBDA_B, LAMBDA_D = "vera.lambda_b", "vera.lambda_d"
Floats = npt.NDArray[Any]  # float32 or float16
# Module, start, stop: some rows of its lambda_b.
Piece = tuple[str, int, int]


@dataclass(frozen=True)
class Packed:
    """An adapter packed for a bundle: the file, its bytes on disk, and the adapter's digest."""

    path: Path
    size: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"path": str(self.path), "size": self.size, "sha256": self.digest}


def model_version(base: str, projections: str, layout: Sequence[Piece]) -> int:
    """What an `.onnx_adapter` carries to say what it is for: digests of base and projections, and the layout.

    31 bits, positive: ONNX Runtime keeps it as a signed 32-bit integer.
    """
    value = f"{base} {projections} {canonical_json([list(piece) for piece in layout]).decode()}"
    return int(sha256_bytes(value.encode())[:8], 16) & 0x7FFFFFFF


def vectors(
    adapter: Adapter, layout: Sequence[Piece], weight: float = 1.0, dtype: str = "float32"
) -> dict[str, Floats]:
    """Both vectors of a graph by input name, (1, 1, size) each; the adapter's delta scaled by `weight`.

    layout: the pieces of lambda_b as the graph takes them; lambda_d has (rank,) for each of their modules, in
    the order of their first pieces. What the adapter leaves alone gets zeros. dtype: "float32" or "float16".
    Raises AdapterError when a module's vector is out of that type's range.
    """
    pairs, nothing = vectors_of(adapter), np.zeros(adapter.rank, np.float32)
    modules = dict.fromkeys(module for module, _, _ in layout)
    pieces = [
        pairs[module].lambda_b[start:stop] * np.float32(weight)
        if module in pairs
        else np.zeros(stop - start, np.float32)
        for module, start, stop in layout
    ]
    scales = [pairs[module].lambda_d if module in pairs else nothing for module in modules]
    found = {}
    for name, parts, owners in (
        (LAMBDA_B, pieces, [module for module, _, _ in layout]),
        (LAMBDA_D, scales, list(modules)),
    ):
        values = [
            stored(part, dtype, f"{name.removeprefix('vera.')} of {module} in {adapter.path}")
            for part, module in zip(parts, owners, strict=True)
        ]
        found[name] = np.concatenate(values)[None, None]
    return found


def write(path: Path, arrays: Mapping[str, Floats], model_version: int) -> Packed:
    """Write vectors as an `.onnx_adapter`, atomically; equal vectors give equal bytes."""
    import tempfile

    import onnxruntime

    form = onnxruntime.AdapterFormat()
    form.set_model_version(model_version)
    form.set_adapter_version(ADAPTER_VERSION)
    form.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in sorted(arrays.items())}
    )
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "adapter"
        form.export_adapter(str(draft))
        data = draft.read_bytes()
    write_atomic(path, data)
    return Packed(path, len(data), sha256_bytes(data))


def pack(
    adapter: Adapter,
    manifest: Manifest,
    path: Path,
    weight: float = 1.0,
    spec: ProjectionSpec | None = None,
) -> Packed:
    """Pack `adapter` for the branch bundle that `manifest` describes.

    spec: the projections the adapter was trained with, where they are known; else rank and seed are compared,
    and the projections themselves when the adapter saved them. The adapter's layers may have PEFT's names.
    The bundle says whether as float32 or float16. Raises MismatchError when rank, seed, projections, layers
    or shapes aren't the bundle's, AdapterError when a vector doesn't fit float16.
    """
    adapter = alignment.align_names(adapter, module_sizes(manifest), manifest.trained_names)
    check(adapter, manifest, spec)
    if not manifest.vectors or manifest.model_version is None:
        raise MismatchError(
            f"the bundle {manifest.folder} doesn't say how its vectors are laid out; export it again"
        )
    layout = [(module, start, stop) for module, start, stop in manifest.vectors]
    if manifest.lora_rank is not None:
        shapes = lora_pairs.PairShapes(manifest.lora_rank, module_shapes(manifest))
        arrays = lora_pairs.arrays(adapter, layout, shapes, weight, manifest.vector_dtype)
    else:
        arrays = vectors(adapter, layout, weight, manifest.vector_dtype)
    return write(path, arrays, manifest.model_version)


def pack_folder(adapter: Path, folder: Path, path: Path, weight: float = 1.0, force: bool = False) -> Packed:
    """`pack` for a PEFT folder and a bundle's folder. Raises OutputError when `path` is taken or in there."""
    check_output(path, force)
    if not math.isfinite(weight):
        raise PlanError(f"the weight of {adapter} is {weight}; give a finite number")
    if path.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"{path} is in the bundle {folder}, which holds what its manifest lists and no more; choose "
            "a place outside of it"
        )
    return pack(adapters.read(adapter), bundle.read(folder), path, weight)


def module_sizes(manifest: Manifest) -> dict[str, int]:
    """Output features of every module that the bundle's graph has a side-branch for."""
    return {module: out for module, (out, _) in module_shapes(manifest).items()}


def module_shapes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that the bundle's graph has a side-branch for."""
    steps: Any = (manifest.plan or {}).get("steps", [])
    return {
        step["module"]: (int(step["shape"][0]), int(step["shape"][1]))
        for step in steps
        if step["action"] == "branch"
    }


def check(adapter: Adapter, manifest: Manifest, spec: ProjectionSpec | None = None) -> None:
    """Raise MismatchError unless `adapter` can run in the bundle that `manifest` describes."""
    where = f"the bundle {manifest.folder}"
    if manifest.mode != "branch" or (manifest.projection is None and manifest.lora_rank is None):
        raise MismatchError(f"{where} has its adapter merged; export it with --mode branch to swap adapters")
    method = VERA if manifest.lora_rank is None else LORA
    if adapter.method != method:
        raise MismatchError(
            f"{adapter.path} is a {adapter.method} adapter, and the side-branches of {where} are for {method}"
        )
    if manifest.lora_rank is None:
        _check_projections(adapter, manifest, where, spec)
    elif not adapter.adds or adapter.rank > manifest.lora_rank:
        what = f"has rank {adapter.rank}" if adapter.adds else "trained magnitudes (DoRA)"
        raise MismatchError(
            f"{adapter.path} {what}, and the side-branches of {where} take LoRA up to rank "
            f"{manifest.lora_rank}"
        )
    shapes = module_shapes(manifest)
    for module, change in adapter.vectors.items():
        if module not in shapes:
            raise MismatchError(f"{adapter.path} adapts {module}, which {where} has no side-branch for")
        out, inside = shapes[module]
        sides = (("outputs", out, change.out_features), ("inputs", inside, change.in_features))
        for side, ours, theirs in sides:
            if theirs not in (None, ours):
                raise MismatchError(
                    f"{module} has {theirs} {side} in {adapter.path} and {ours} in {where}; the adapter "
                    "belongs to another base"
                )
    whole = manifest.base.get("trained", {})  # what the graph holds of the adapter it was exported with
    held = {name for name, tensor in adapter.modules_to_save.items() if whole.get(name) == digest_of(tensor)}
    if more := sorted([*adapter.biases, *(adapter.modules_to_save.keys() - held)]):
        raise MismatchError(
            f"{adapter.path} also trained {more[0]}, which a side-branch can't carry; merge it"
        )


def _check_projections(adapter: Adapter, manifest: Manifest, where: str, spec: ProjectionSpec | None) -> None:
    """Raise MismatchError unless a VeRA adapter was trained with the projections of the bundle."""
    ours = manifest.projection
    assert ours is not None
    low = 0xFFFFFFFF  # torch uses the low 32 bits of a seed
    if adapter.rank != ours["rank"]:
        raise MismatchError(f"{adapter.path} has rank {adapter.rank} and {where} has rank {ours['rank']}")
    if adapter.seed & low != ours["seed"] & low:
        raise MismatchError(f"{adapter.path} has projection seed {adapter.seed}, {where} has {ours['seed']}")
    if spec is not None and (theirs := spec.to_dict()) != {key: ours[key] for key in spec.to_dict()}:
        field = next(key for key in theirs if theirs[key] != ours[key])
        raise MismatchError(
            f"{adapter.path} was trained with projections of {field} {theirs[field]}, and {where} has "
            f"{ours[field]}"
        )
    if adapter.saved is not None and _saved_digest(adapter.saved, ours) != ours["digest"]:
        raise MismatchError(f"the projections saved in {adapter.path} aren't those of {where}")
    if adapter.saved is None and spec is None and not _from_seed(ours):
        raise MismatchError(
            f"{adapter.path} doesn't hold its projections, and those of {where} aren't what its seed gives"
        )


def _from_seed(facts: Mapping[str, Any]) -> bool:
    """Whether a bundle's projections are those of its spec, and not some that an adapter brought."""
    return stream_digest(_spec(facts)) == facts["digest"]


def _spec(facts: Mapping[str, Any]) -> ProjectionSpec:
    return ProjectionSpec.from_dict({key: value for key, value in facts.items() if key != "digest"})


def _saved_digest(saved: tuple[Float32, Float32], facts: Mapping[str, Any]) -> str:
    spec = _spec(facts)
    if saved[0].shape != (spec.rank, spec.in_max) or saved[1].shape != (spec.out_max, spec.rank):
        return ""
    return Projections(spec, *saved).digest
