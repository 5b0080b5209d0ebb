"""Leaves the projections out of an export: a file of their own, which the device draws from the seed.

The graph is the same as with baked projections but for the file's name; `vera_edge.device.projections` writes
that file, so here it is written once, compared with what is drawn, listed as generated, and removed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vera_edge import bundle
from vera_edge.bundle import Facts, Manifest
from vera_edge.device import projections
from vera_edge.errors import PlanError, TargetError
from vera_edge.files import sha256_file
from vera_edge.progress import Progress
from vera_edge.projection import stream_digest
from vera_edge.target import ExportRequest

OPTION = "origin"
_ORIGINS = ("baked", "seed")
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}
_NAME = re.compile(r"vera\.([AB])(?:\.fp16)?\[(\d+):(\d+)\]")
_MATRICES = {"A": "A.T", "B": "B"}


def wanted(request: ExportRequest) -> bool:
    """Whether the projections stay out of the files. Raises PlanError when they can't."""
    origin = request.options.get(OPTION, "baked")
    if origin not in _ORIGINS:
        raise PlanError(f"projections can't be {origin!r}; choose from {', '.join(_ORIGINS)}")
    if origin == "baked":
        return False
    if request.plan.mode != "branch":
        raise PlanError("a merged export holds no projections to leave out; use --mode branch")
    if (dtype := request.options.get("projections", "fp32")) not in ("fp32", "fp16"):
        raise PlanError(f"projections drawn from the seed are fp32 or fp16, not {dtype}; bake them instead")
    if stream_digest(request.projections.spec) != request.projections.digest:
        raise PlanError(
            f"the seed of {request.adapters[0][0].path} doesn't give the projections that were saved with "
            "it; bake them instead"
        )
    return True


def tensors(model: ir.Model) -> frozenset[str]:
    """The initializers that hold projections."""
    return frozenset(name for name in model.graph.initializers if _NAME.fullmatch(name))


def write(stage: Path, model: ir.Model, file: str, facts: Facts, progress: Progress) -> Manifest:
    """Write the manifest of `stage`, in which `file` is generated, and remove that file.

    model: as it was saved. Raises TargetError when the device would draw another file.
    """
    path = stage / file
    entry = {"size": path.stat().st_size, "sha256": sha256_file(path), **_layout(model, path.name)}
    manifest = bundle.write(stage, replace(facts, generated={file: entry}), progress)
    with tempfile.TemporaryDirectory(prefix=".drawn-", dir=stage) as drawn:
        projections.write(manifest, Path(drawn))
        if sha256_file(Path(drawn) / file) != entry["sha256"]:
            raise TargetError("the projections drawn from the seed aren't those of the graph; bake them")
    path.unlink()
    return manifest


def _layout(model: ir.Model, location: str) -> Mapping[str, Any]:
    """The dtype and the tensors of the data file `location`, as the manifest lists them."""
    found, dtypes = {}, set()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.location != location:
            continue
        match = _NAME.fullmatch(name)
        assert match is not None and tensor.offset is not None
        start, stop = int(match[2]), int(match[3])
        rows = {"matrix": _MATRICES[match[1]], "start": start, "stop": stop, "offset": tensor.offset}
        found[name] = rows
        dtypes.add(_DTYPES[tensor.dtype])
    (dtype,) = dtypes
    return {"dtype": dtype, "tensors": found}
