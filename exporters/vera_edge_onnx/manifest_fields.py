"""What an exported folder says about how it was made: in the graph's metadata, and in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import vera_edge
from vera_edge.bundle.contents import ManifestFields
from vera_edge.exporting import exported_adapters
from vera_edge.exporting.branch_inputs import Piece
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json
from vera_edge.tasks import task as tasks
from vera_edge.trained.alignment import trained_names
from vera_edge_onnx import options
from vera_edge_onnx.branch import adapters
from vera_edge_onnx.weights.stored import runs_as

_TOOLS = ("numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "transformers")
# The oldest ONNX Runtime that knows every operator, and adapters, as they are written here.
_OLDEST = "1.22"
_OLDEST_WITH_INTEGER_TABLE = "1.23"  # tried: 1.22 doesn't know how many bits GatherBlockQuantized reads
_OLDEST_WITH_INT8_CACHE = "1.27"  # tried: 1.26 takes the graph, and fails when it runs
# Who draws the graph, by the kind of model.
_DRAWN_BY = {"decoder": ("onnxruntime-genai",), "encoder": ("onnxscript", "optimum")}


def tools(kind: str) -> dict[str, str]:
    """The versions of what takes part in the export of a "decoder" or "encoder"."""
    return {"vera-edge": vera_edge.__version__} | {
        name: version(name) for name in (*_TOOLS, *_DRAWN_BY[kind])
    }


def describe(request: ExportRequest, model_kind: str = "decoder") -> dict[str, str]:
    """Metadata of the graph: text by name, without a path or a time.

    A graph with side-branches holds no adapter, so it names none: it's the same file for all of them.
    """
    plan = request.plan
    merged = request.model.adapters if plan.mode == "merged" else ()
    decided = plan.to_dict() | ({} if merged else {"adapters": []})
    return {
        "vera_edge.adapters": ",".join(adapter.digest for adapter, _ in merged),
        "vera_edge.base": request.model.checkpoint.digest,
        "vera_edge.mode": plan.mode,
        "vera_edge.plan": sha256_bytes(canonical_json(decided)),
        "vera_edge.projections": request.model.projection_digest or "",
        "vera_edge.tools": ",".join(f"{name}={number}" for name, number in sorted(tools(model_kind).items())),
        "vera_edge.weights": runs_as(request),
    }


def manifest_fields(
    request: ExportRequest,
    model: str,
    files: Mapping[str, str],
    layout: Sequence[Piece],
    model_kind: str = "decoder",
) -> ManifestFields:
    """The manifest's facts.

    files: adapter name -> its file, in the order of `request.model.adapters`. layout: of the graph's vectors.
    """
    plan, branch, overlay = request.plan, bool(files), request.model.checkpoint.overlay
    whole = overlay.digests if overlay is not None else {}
    names, inputs = exported_adapters.names(request), adapters.inputs(request)
    beside = options.beside(request, model_kind == "encoder")
    return ManifestFields(
        kind=model_kind,
        mode=plan.mode,
        weights=runs_as(request),
        model=model,
        base={
            "digest": request.model.checkpoint.digest,
            "architecture": tasks.architecture(request.model.checkpoint.config),
            **({"trained": dict(whole)} if whole else {}),
        },
        adapters={
            name: {"file": files.get(name), "digest": adapter.digest, "weight": weight}
            for name, (adapter, weight) in zip(names, request.model.adapters, strict=True)
        },
        default_adapter=names[0] if branch else None,
        projection=request.model.projection_record if branch else None,
        lora_rank=inputs.rank or None,
        branches=inputs.to_dict(),
        model_version=adapters.model_version(request, layout) if branch else None,
        trained_names=_trained_names(request) if branch else {},
        vectors=layout,
        vector_dtype=adapters.vector_dtype(request),
        requires={"onnxruntime": _oldest(request, beside[options.HEAD])},
        plan=plan.to_dict(),
        options={**request.options, **beside},
        exact=options.is_exact(request, model_kind == "encoder"),
        tools=tools(model_kind),
    )


def _oldest(request: ExportRequest, head: str) -> str:
    """The oldest ONNX Runtime that runs the graph; head: what embeddings and head are stored as."""
    if options.has_int8_cache(request):
        return _OLDEST_WITH_INT8_CACHE
    return _OLDEST_WITH_INTEGER_TABLE if head.startswith("int") else _OLDEST


def _trained_names(request: ExportRequest) -> dict[str, str]:
    names: dict[str, str] = {}
    for adapter, _ in request.model.adapters:
        names |= trained_names(adapter)
    return dict(sorted(names.items()))
