"""Projections that the device draws from the seed: whether they can be, and how their file is laid out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from vera_edge.adapters.projection import stream_digest
from vera_edge.errors import PlanError
from vera_edge.exporting.exporter import ExportRequest

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
    projections = request.model.projections
    if projections is None:
        raise PlanError("only VeRA's projections are drawn from a seed; leave --projections out")
    if stream_digest(projections.spec) != projections.digest:
        raise PlanError(
            f"the seed of {request.model.adapters[0][0].path} doesn't give the projections that were saved "
            "with it; bake them instead"
        )
    return True


def tensors(model: ir.Model) -> frozenset[str]:
    """The initializers that hold projections."""
    return frozenset(name for name in model.graph.initializers if _NAME.fullmatch(name))


def layout(model: ir.Model, location: str) -> Mapping[str, Any]:
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
