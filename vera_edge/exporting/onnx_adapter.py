"""Packs an adapter's vectors for a branch bundle, as the `.onnx_adapter` that ONNX Runtime swaps in.

ONNX Runtime checks neither that a file brings every vector nor whose they are, so what doesn't belong to the
bundle's base, projections or layers is refused here, with the field that differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.peft_methods import PeftTensors
from vera_edge.adapters.projection import ProjectionSpec
from vera_edge.adapters.vera import vectors_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import MismatchError, OutputError, PlanError
from vera_edge.exporting import branch_inputs, gguf_adapter, olive
from vera_edge.exporting.adapter_fit import check, inputs_of, module_shapes
from vera_edge.exporting.branch_form import BIASES, VECTORS, forms_of, kinds_of, needs_base
from vera_edge.exporting.branch_inputs import BranchInputs, Piece
from vera_edge.exporting.float_range import stored
from vera_edge.storage.files import check_output, sha256_bytes, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.trained import alignment
from vera_edge.trained import model as trained_base

ADAPTER_VERSION = 1
# The graph's inputs: every module's lambda_b in a row, and every module's lambda_d.
LAMBDA_B, LAMBDA_D = "vera.lambda_b", "vera.lambda_d"
Floats = npt.NDArray[Any]  # float32 or float16


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
    base: Checkpoint | None = None,
) -> Packed:
    """Pack `adapter` for the branch bundle that `manifest` describes.

    spec: the projections the adapter was trained with, where they are known; else rank and seed are compared,
    and the projections themselves when the adapter saved them. The adapter's layers may have PEFT's names.
    base: the base's weights, which what DoRA makes of them depends on. The bundle says whether as float32 or
    float16. Raises MismatchError when rank, seed, projections, layers or shapes aren't the bundle's, or the
    base is missing or another; AdapterError when a vector doesn't fit float16.
    """
    adapter = alignment.align_names(adapter, module_shapes(manifest), manifest.trained_names)
    check(adapter, manifest, spec)
    if not manifest.vectors or manifest.model_version is None:
        raise MismatchError(
            f"the bundle {manifest.folder} doesn't say how its vectors are laid out; export it again"
        )
    if not adapter.adds and weight != 1:
        raise PlanError(f"{adapter.path} makes another weight of a weight; give it weight 1")
    if BIASES in kinds_of(adapter) and weight != 1:
        raise PlanError(f"{adapter.path} also replaces biases, which can't be weighted; give it weight 1")
    layout = [(module, start, stop) for module, start, stop in manifest.vectors]
    if adapter.is_vera:
        pieces = inputs_of(manifest).pieces(VECTORS, layout)
        arrays = vectors(adapter, pieces, weight, manifest.vector_dtype)
    else:
        arrays = _others_arrays(adapter, manifest, layout, weight, base)
    return write(path, arrays, manifest.model_version)


def _others_arrays(
    adapter: Adapter, manifest: Manifest, layout: Sequence[Piece], weight: float, base: Checkpoint | None
) -> dict[str, Floats]:
    """What another method than VeRA brings for a bundle's graph; raises as `pack`."""
    inputs = inputs_of(manifest)
    if base is not None and base.digest != manifest.base["digest"]:
        raise MismatchError(f"{manifest.folder} was made of another base than {base.path}; name its own")
    if base is None and needs_base(adapter):
        raise MismatchError(
            f"{adapter.path} ({adapters.title_of(adapter)}) says what becomes of the base's own values, so "
            "they are needed to put it beside them; give --base"
        )
    adapter = _with_shapes(adapter, inputs)
    forms = forms_of(adapter, base)
    if (rank := branch_inputs.rank_of(forms)) > inputs.rank:
        raise MismatchError(
            f"{adapter.path} has rank {rank}, and the side-branches of the bundle {manifest.folder} take "
            f"LoRA up to rank {inputs.rank}"
        )
    return branch_inputs.arrays(adapter, forms, inputs, layout, weight, manifest.vector_dtype)


def _with_shapes(adapter: Adapter, inputs: BranchInputs) -> Adapter:
    """`adapter` whose layers, where PEFT's layers compute them, know how large they are."""
    changed = {
        module: replace(change, shape=inputs.shapes[module])
        for module, change in adapter.vectors.items()
        if isinstance(change, PeftTensors)
    }
    return replace(adapter, vectors={**adapter.vectors, **changed}) if changed else adapter


def pack_folder(
    adapter: Path,
    folder: Path,
    path: Path,
    weight: float = 1.0,
    force: bool = False,
    base: Path | None = None,
    trained_as: TrainedAs | None = None,
) -> Packed:
    """`pack` for a PEFT folder, or a file of Olive's, and a bundle's folder; base: its folder, if needed.

    trained_as: how the base was loaded in training. Raises OutputError when `path` is taken or in there.
    """
    check_output(path, force)
    if not math.isfinite(weight):
        raise PlanError(f"the weight of {adapter} is {weight}; give a finite number")
    if path.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"{path} is in the bundle {folder}, which holds what its manifest lists and no more; choose "
            "a place outside of it"
        )
    manifest = bundle.read(folder)
    if manifest.is_gguf:
        digest = gguf_adapter.pack_folder(adapter, manifest, path, weight, base, trained_as)
        return Packed(path, path.stat().st_size, digest)
    checkpoint, read = None, olive.read(adapter) if adapter.is_file() else adapters.read(adapter)
    if base is not None and needs_base(read):
        checkpoint, ((read, _),) = trained_base.read(base, [(adapter, 1.0)], None, trained_as)
    return pack(read, manifest, path, weight, base=checkpoint)
