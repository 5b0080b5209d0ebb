"""llama.cpp target: one GGUF file, with weights in llama.cpp's own formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vera_edge.bundle.contents import Manifest
from vera_edge.exporting.exporter import Export, ExportRequest
from vera_edge.plans.plan import Plan
from vera_edge.trained.trained_model import TrainedModel
from vera_edge_gguf import adapters, export, tensor_types


class GgufExporter:
    """Decoders of the families that llama.cpp knows."""

    @property
    def name(self) -> str:
        return "gguf"

    @property
    def weights(self) -> Mapping[str, str]:
        """What linear layers can be asked to be -> the plan's name of it."""
        return tensor_types.ASKED

    def settle(self, plan: Plan, model: TrainedModel) -> Plan:
        """`plan` with the type that each layer gets; see `tensor_types.settle`."""
        return tensor_types.settle(plan, model)

    def usual_weights(self, model: TrainedModel, mode: str, options: Mapping[str, str]) -> str:
        """What linear layers are stored as where nobody asks."""
        return "q8_0"

    def usual_note(self, request: ExportRequest, weights: str) -> str:
        """A sentence for a person who didn't ask for weights."""
        return (
            f"{weights} weights, as --weights wasn't given: 8.5 bits a weight; --weights q4_k_m takes about "
            "4.8 and loses more, f16 takes 16"
        )

    def export(self, request: ExportRequest) -> Export:
        """Write `request.out`, whole or not at all; see `export.export` for what is raised."""
        return export.export(request, self.name)

    def pack(self, model: TrainedModel, manifest: Manifest, out: Path, name: str) -> None:
        """Write the adapter of `model` as a GGUF LoRA, stored as those of the exported branch `manifest`."""
        adapters.pack(model, out, manifest.options.get(adapters.PROJECTIONS, "fp32"), name)


EXPORTER = GgufExporter()
