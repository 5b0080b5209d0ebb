"""Whether an export is the model as trained, so that others can be measured against it, by its manifest."""

from __future__ import annotations

from typing import Any

from vera_edge.bundle.contents import Manifest

_OPTIONS = {
    "head": "its embeddings and head are",
    "projections": "its projections are",
    "vectors": "its adapter's vectors are",
}


def unlike_trained(manifest: Manifest) -> str | None:
    """Why an export with its default adapter isn't the model as trained, in words; None when it is."""
    if manifest.mode != "branch":
        return "the adapter is merged into its weights"
    if manifest.exact is not True:
        return _inexact(manifest)
    if (name := manifest.default_adapter) is None:
        return "no adapter of it runs by default"
    weight: Any = manifest.adapters[name].get("weight", 1.0)
    return None if weight == 1 else f"its adapter {name} has weight {weight}, and was trained with 1"


def _inexact(manifest: Manifest) -> str:
    """What of a branch export was rounded, or may have been, in words."""
    for option, words in _OPTIONS.items():
        if (dtype := manifest.options.get(option, "fp32")) != "fp32":
            return f"{words} stored as {dtype}"
    steps: Any = (manifest.plan or {}).get("steps")
    for step in steps if isinstance(steps, list) else ():
        source, result = step.get("source"), step.get("result")
        if result != "fp32" and source != result:
            return f"{step.get('module')} is {source} in the base and was quantized to {result}"
    if manifest.exact is None:
        return "its manifest, an older one, doesn't say whether all of it is exact (export it again)"
    if (kept := manifest.options.get("kv_cache", "float")) != "float":
        return f"its keys and values are kept as {kept}"
    if "run" in manifest.options:
        return f"its weights run as {manifest.options['run']}"
    if manifest.options.get("accuracy_level", "4") != "0":
        return (
            f"what its {manifest.weights} weights are multiplied with is rounded (without --accuracy-level 0)"
        )
    return f"not all of its {manifest.weights} weights are the base's own"
