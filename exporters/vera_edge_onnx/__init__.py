"""ONNX Runtime target: weaves stored weights and side-branches into a float graph."""

from __future__ import annotations

from vera_edge.errors import TargetError
from vera_edge.exporting.target import Export, ExportRequest
from vera_edge.tasks import task as tasks
from vera_edge_onnx.classes import ENCODER_OF


class OnnxExporter:
    """Decoders, whose folder ONNX Runtime GenAI opens too, and encoders."""

    @property
    def name(self) -> str:
        return "onnx"

    def export(self, request: ExportRequest) -> Export:
        """Write `request.out`, whole or not at all; see the one that does it for what is raised."""
        name = tasks.architecture(request.model.checkpoint.config)
        if not name:
            raise TargetError(
                f"{request.model.checkpoint.path / 'config.json'} names no architecture to export"
            )
        if tasks.is_decoder(name) and name not in ENCODER_OF:
            from vera_edge_onnx.decoder import export as decoder

            return decoder.export(request, self.name, name)
        from vera_edge_onnx.encoder import export as encoder

        return encoder.export(request, self.name, name)


EXPORTER = OnnxExporter()
