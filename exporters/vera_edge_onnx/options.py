"""The options of an export to ONNX, what they come to, and those that would change nothing: refused."""

from __future__ import annotations

from vera_edge.adapters.reading import title_of
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.plans.plan import FLOAT
from vera_edge.tasks import task as tasks
from vera_edge_onnx.branch import adapters, seed
from vera_edge_onnx.classes import ENCODER_OF
from vera_edge_onnx.weights import head_activations
from vera_edge_onnx.weights import stored as weights

HEAD, PROJECTIONS, HEAD_ACTIVATIONS = "head", "projections", "head_activations"
_STORED = ("fp32", "fp16", "int8", "int4")
KV_CACHE, _KEPT_AS = "kv_cache", ("float", "int8")
_KNOWN = (
    HEAD,
    PROJECTIONS,
    HEAD_ACTIVATIONS,
    weights.ACCURACY,
    weights.RUN,
    seed.OPTION,
    adapters.VECTORS,
    KV_CACHE,
)


def check(request: ExportRequest, target: str) -> None:
    """Raise before any work is done when an option can't be met, or would have no effect.

    Raises PlanError on an option, TargetError when the weights or the adapter can't be exported.
    """
    if unknown := sorted(set(request.options) - set(_KNOWN)):
        raise PlanError(f"the target {target} takes no option {unknown[0]!r}; it takes {', '.join(_KNOWN)}")
    weights.runs_as(request)
    seed.wanted(request)
    adapters.check(request)
    _check_kv_cache(request)
    if PROJECTIONS in request.options and request.plan.mode != "branch":
        raise PlanError(
            "a merged export holds no projections to store; leave --store-projections out, or add "
            "--mode branch"
        )
    if PROJECTIONS in request.options and not adapters.has_vectors(request):
        raise PlanError(
            f"an adapter of {title_of(request.model.adapters[0].adapter)} has no projections to store; leave "
            "--store-projections out"
        )
    if weights.ACCURACY in request.options and not _has_integer_products(request):
        raise PlanError(
            "an accuracy level is for products with integers in blocks (MatMulNBits), which this export has "
            "none of; leave it out, or add --weights int8"
        )
    _check_head_activations(request)


def head_activations_of(request: ExportRequest) -> str:
    """What the products of an integer head read: "int8" or "int16"."""
    return request.options.get(HEAD_ACTIVATIONS, head_activations.INT8)


def _check_head_activations(request: ExportRequest) -> None:
    if (asked := head_activations_of(request)) not in head_activations.KINDS:
        raise PlanError(f"a head can't read {asked!r}; choose from {', '.join(head_activations.KINDS)}")
    if HEAD_ACTIVATIONS in request.options and (name := _encoder(request)) is not None:
        raise TargetError(
            f"{name} is exported as an encoder, which has no output head over the vocabulary to read them; "
            "leave --head-activations out"
        )
    if asked == head_activations.INT8:
        return
    if request.options.get(weights.ACCURACY) == "0":
        raise PlanError(
            "at accuracy level 0 the head reads floats already; leave --head-activations or "
            "--accuracy-level out"
        )
    if (stored := beside(request)[HEAD]) not in weights.INTEGERS:
        raise PlanError(
            f"the head is stored as {stored} and reads floats; leave --head-activations out, or add "
            "--head int8"
        )


def has_int8_cache(request: ExportRequest) -> bool:
    """Whether keys and values are to be kept as int8."""
    return request.options.get(KV_CACHE) == "int8"


def _check_kv_cache(request: ExportRequest) -> None:
    if (kept := request.options.get(KV_CACHE, _KEPT_AS[0])) not in _KEPT_AS:
        raise PlanError(f"keys and values can't be kept as {kept!r}; choose from {', '.join(_KEPT_AS)}")
    if KV_CACHE in request.options and (name := _encoder(request)) is not None:
        raise PlanError(f"{name} generates no text and keeps no keys and values; leave --kv-cache out")


def _encoder(request: ExportRequest) -> str | None:
    """The model's class where it is exported as an encoder."""
    name = tasks.architecture(request.model.checkpoint.config)
    return None if tasks.is_decoder(name) and name not in ENCODER_OF else name


def beside(request: ExportRequest, encoder: bool = False) -> dict[str, str]:
    """What the ends, and of a branch the projections and vectors, are stored as, by option.

    Raises PlanError for a head that isn't stored so.
    """
    if (head := request.options.get(HEAD, _STORED[0])) not in _STORED:
        raise PlanError(f"the head can't be stored as {head!r}; choose from {', '.join(_STORED)}")
    kind = weights.runs_as(request)
    own = weights.beside(kind, four_bit="int4" if encoder else "int8")
    found = {HEAD: request.options.get(HEAD, own)}
    if request.plan.mode == "branch":
        as_given = seed.wanted(request) and (encoder or kind != "fp16")
        usual = "fp32" if as_given else weights.beside(kind)
        if adapters.has_vectors(request):
            found[PROJECTIONS] = request.options.get(PROJECTIONS, usual)
        found[adapters.VECTORS] = request.options.get(adapters.VECTORS, "fp32")
    return found


def is_exact(request: ExportRequest, encoder: bool = False) -> bool:
    """Whether the graph, its adapter beside it, holds every value of the model as trained, and no other."""
    plan = request.plan
    return (
        plan.mode == "branch"
        and all(adapter.adds for adapter, _ in request.model.adapters)  # what others trained is computed with
        and not request.requantized
        and not request.corrections
        and not has_int8_cache(request)
        and weights.runs_as(request) == weights.kind(plan)
        and set(beside(request, encoder).values()) == {"fp32"}
        and all(weights.is_exact(request, step) for step in plan.steps)
    )


def _has_integer_products(request: ExportRequest) -> bool:
    kind = weights.runs_as(request)
    kinds = {kind, *(weights.stored_as(step) for step in request.plan.steps if step.activations == FLOAT)}
    kinds.add(request.options.get(HEAD, weights.beside(kind)))
    if adapters.has_vectors(request):
        kinds.add(request.options.get(PROJECTIONS, weights.beside(kind)))
    return not kinds.isdisjoint(weights.INTEGERS)
