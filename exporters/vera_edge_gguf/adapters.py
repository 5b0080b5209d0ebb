"""What a request's adapters are called, and their files beside a base."""

from __future__ import annotations

from vera_edge.exporting.target import ExportRequest


def merged_names(request: ExportRequest) -> list[str]:
    """What each merged adapter is called in the manifest: by its folder, numbered where that is taken."""
    found: list[str] = []
    for adapter, _ in request.model.adapters:
        name, number = adapter.name, 1
        while name in found:
            number += 1
            name = f"{adapter.name[:60]}-{number}"
        found.append(name)
    return found
