"""ONNX Runtime GenAI target."""
