"""Training on what is shipped: a base's exact values for PEFT, and adapters carried to another base.

    loading           a quantized base as a transformers model of ordinary linears, for PEFT's VeRA
    runtime_rounding  what ONNX Runtime rounds while it runs, in the forward pass
    adapting          an adapter carried from the base it was trained on to the one that is shipped
    distillation      its lambda vectors, or LoRA's pairs, trained towards the model as trained
    on_device         both models on an accelerator
    adapter_folder    the adapter's folder, with other values

PEFT and the Trainer do the training; here are only the weights they train on.
"""

from __future__ import annotations

from vera_edge.training.loading import load

__all__ = ["load"]
