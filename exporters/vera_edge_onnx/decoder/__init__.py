"""Decoders: drawn by ONNX Runtime GenAI's model builder, completed, held against the model, and written."""
