"""ONNX Runtime GenAI target: decoders."""

from __future__ import annotations

from vera_edge_genai.export import GenaiExporter

EXPORTER = GenaiExporter()
