"""A bundle opened in ONNX Runtime: text token by token, embeddings and classes, adapters swapped."""
