"""What linear layers are stored as where nobody asks: what somebody with a small device would take."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from vera_edge.errors import VeraEdgeError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.plans import plan as plans
from vera_edge.plans.plan import SAME, Plan
from vera_edge.tasks import task as tasks
from vera_edge.trained.trained_model import TrainedModel
from vera_edge_onnx import options
from vera_edge_onnx.classes import ENCODER_OF
from vera_edge_onnx.estimate import estimate
from vera_edge_onnx.weights import stored

_BNB4 = ("nf4", "fp4")
_OF_INTEGERS = ("block", "symmetric", "activations", stored.ACCURACY)  # options that speak of integers
# What merged int8 and int4 keep of the adapter's effect on SmolLM2-135M, %: docs/drift-table.md.
_KEPT = {"int8": 99, "int4": 91}


def usual(model: TrainedModel, mode: str, given: Mapping[str, str]) -> str:
    """What the linear layers are: int8 in blocks, but beside a branch a quantized base's own integers.

    given: options of the export; those that speak of integers ask for int8, `run` for 4 bits that become
    int8.
    """
    own = {step.source for step in plans.plan_model(model, mode, SAME).steps} - set(plans.DENSE)
    four_bit = next((name for name in _BNB4 if own == {name}), None)
    if stored.RUN in given:
        return four_bit or "nf4"
    if mode != "branch" or not own or any(name in given for name in _OF_INTEGERS):
        return "int8"
    return four_bit or (SAME if _stays(model) else "int8")


def _stays(model: TrainedModel) -> bool:
    """Whether a graph holds a base's own integers."""
    with suppress(VeraEdgeError):
        return stored.kind(plans.plan_model(model, "branch", SAME)) in (*stored.INTEGERS, *_BNB4)
    return False


def note(request: ExportRequest, weights: str) -> str:
    """A sentence: what `weights` come to, which nobody asked for, and what other choices would."""
    name = tasks.architecture(request.model.checkpoint.config)
    encoder = not tasks.is_decoder(name) or name in ENCODER_OF
    mode, kept = request.plan.mode, {} if encoder else _KEPT
    others = [
        _told(request, "merged", "--mode merged --weights int8", "int8", kept, encoder)
        if mode == "branch"
        else None,
        _told(request, mode, "--weights int8", "int8", kept, encoder) if weights != "int8" else None,
        _told(request, mode, "--weights int4", "int4", kept, encoder),
        _branch(request, encoder) if mode == "merged" else None,
    ]
    size = estimate(request, False, encoder).size
    said = f"{weights} weights, as --weights wasn't given: {_about(size)}{_why(mode, weights, kept)}"
    return "; ".join([said, *filter(None, others), "vera-edge plan chooses layer by layer within a size"])


def _why(mode: str, weights: str, kept: Mapping[str, int]) -> str:
    if mode == "branch" and weights != "int8":
        return ", the base's own integers"
    share = kept.get(weights)
    return "" if share is None else f", {share} % of the adapter's effect kept on SmolLM2-135M"


def _told(
    request: ExportRequest, mode: str, words: str, weights: str, kept: Mapping[str, int], encoder: bool
) -> str | None:
    size = _size(request, mode, weights, encoder)
    share = f" ({kept[weights]} %)" if weights in kept else ""
    return None if size is None else f"{words}: {_about(size)}{share}"


def _branch(request: ExportRequest, encoder: bool) -> str | None:
    weights = usual(request.model, "branch", {})
    size = _size(request, "branch", weights, encoder)
    gives = "adapters that can be swapped" + (", nothing lost, slower" if weights in _BNB4 else "")
    return None if size is None else f"--mode branch: {_about(size)}, {gives}"


def _size(request: ExportRequest, mode: str, weights: str, encoder: bool) -> int | None:
    """Bytes of the export with other weights; None where that isn't for this model or these options."""
    with suppress(VeraEdgeError):
        plan: Plan = plans.plan_model(request.model, mode, weights)
        other = replace(request, plan=plan, options={})
        options.check(other, "onnx")  # whether the adapter can be a branch, for one
        return estimate(other, False, encoder).size
    return None


def _about(size: int) -> str:
    return f"about {size / 1e6:,.0f} MB" if size >= 1e7 else f"about {size / 1e6:,.1f} MB"
