"""What an exported folder says about how it was made: in the GGUF file's metadata, and in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import vera_edge
from vera_edge.bundle.contents import ManifestFields
from vera_edge.exporting import exported_adapters
from vera_edge.exporting.exporter import ExportRequest
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json
from vera_edge.tasks import task as tasks

_TOOLS = ("gguf", "numpy", "torch", "transformers")


def tools() -> dict[str, str]:
    """The versions of what takes part in an export."""
    return {"vera-edge": vera_edge.__version__} | {name: version(name) for name in _TOOLS}


def describe(request: ExportRequest) -> dict[str, str]:
    """Metadata of the file: text by key, without a path or a time. llama.cpp takes no notice of it."""
    plan = request.plan
    merged = request.model.adapters if plan.mode == "merged" else ()
    decided = plan.to_dict() | ({} if merged else {"adapters": []})
    return {
        "vera_edge.adapters": ",".join(adapter.digest for adapter, _ in merged),
        "vera_edge.base": request.model.checkpoint.digest,
        "vera_edge.mode": plan.mode,
        "vera_edge.plan": sha256_bytes(canonical_json(decided)),
        "vera_edge.projections": request.model.projection_digest or "",
        "vera_edge.tools": ",".join(f"{name}={number}" for name, number in sorted(tools().items())),
    }


def manifest_fields(request: ExportRequest, model: str, files: Mapping[str, str]) -> ManifestFields:
    """The manifest's facts.

    model: the GGUF file. files: adapter name -> its LoRA file, in the order of `request.model.adapters`; none
    where they are merged.
    """
    plan, overlay = request.plan, request.model.checkpoint.overlay
    whole = overlay.digests if overlay is not None else {}
    names = exported_adapters.names(request)
    return ManifestFields(
        kind="decoder",
        mode=plan.mode,
        weights=plan.weights,
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
        default_adapter=names[0] if files else None,
        plan=plan.to_dict(),
        options=dict(request.options),
        exact=False,
        tools=tools(),
    )
