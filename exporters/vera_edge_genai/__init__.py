"""ONNX Runtime GenAI target: decoders."""

from __future__ import annotations

from vera_edge_onnx.decoder.export import GenaiExporter

EXPORTER = GenaiExporter()
