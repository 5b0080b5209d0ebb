"""ONNX Runtime target: weaves stored weights and side-branches into a float graph."""

from __future__ import annotations

from collections.abc import Mapping

from vera_edge.errors import TargetError
from vera_edge.exporting.costs import ExportCost
from vera_edge.exporting.exporter import Export, ExportRequest
from vera_edge.requantize import Grid
from vera_edge.tasks import task as tasks
from vera_edge.trained.trained_model import TrainedModel
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

    def estimate(self, request: ExportRequest, timed: bool = True) -> ExportCost:
        """What `export` takes and writes, by estimate; writes nothing. Raises as it does on the request."""
        from vera_edge_onnx import options
        from vera_edge_onnx.estimate import estimate

        options.check(request, self.name)
        name = tasks.architecture(request.model.checkpoint.config)
        return estimate(request, timed, not tasks.is_decoder(name) or name in ENCODER_OF)

    def usual_weights(self, model: TrainedModel, mode: str, options: Mapping[str, str]) -> str:
        """What linear layers are stored as where nobody asks."""
        from vera_edge_onnx import usual_weights

        return usual_weights.usual(model, mode, options)

    def usual_note(self, request: ExportRequest, weights: str) -> str:
        """A sentence for a person who didn't ask for weights. Raises as `estimate` does."""
        from vera_edge_onnx import options, usual_weights

        options.check(request, self.name)
        return usual_weights.note(request, weights)

    def head_grid(self, request: ExportRequest) -> Grid | None:
        """What a decoder's output head is stored on, where it loses by being rounded to nearest: 4 bits."""
        from vera_edge_onnx import options
        from vera_edge_onnx.weights import head

        options.check(request, self.name)
        config, dtype = request.model.checkpoint.config, options.beside(request)[options.HEAD]
        name = tasks.architecture(config)
        if dtype != "int4" or not tasks.is_decoder(name) or name in ENCODER_OF:
            return None
        return head.grid_of(config, request.plan)


EXPORTER = OnnxExporter()
