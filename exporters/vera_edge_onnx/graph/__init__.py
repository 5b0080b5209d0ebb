"""An ONNX graph under change: its linear layers, new nodes and initializers, writing it to disk."""
