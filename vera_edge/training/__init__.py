"""Training on what is shipped: a base's exact values, as a model that PEFT takes.

    loading           a quantized base as a transformers model of ordinary linears, for PEFT's VeRA
    runtime_rounding  what ONNX Runtime rounds while it runs, in the forward pass

PEFT and the Trainer do the training; here are only the weights they train on.
"""

from __future__ import annotations

from vera_edge.training.loading import load

__all__ = ["load"]
