"""ONNX Runtime target: weaves stored weights and side-branches into a float graph."""

from __future__ import annotations

from vera_edge.target import Export, ExportRequest, find


class OnnxExporter:
    """Any model: decoders by way of the genai target, whose folder plain ONNX Runtime opens too."""

    @property
    def name(self) -> str:
        return "onnx"

    def export(self, request: ExportRequest) -> Export:
        """Write `request.out`, whole or not at all; see the target that does it for what is raised."""
        return find("genai").export(request)


EXPORTER = OnnxExporter()
