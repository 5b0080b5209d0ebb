"""Encoders and classifiers: drawn by transformers' exporter, held against the model, and written."""
