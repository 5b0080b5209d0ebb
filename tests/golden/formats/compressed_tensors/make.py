"""Makes the golden compressed-tensors checkpoints with the library's own compressors.

The values are what its `decompress` gives with the scales widened to float32.
Run with compressed-tensors 0.20 installed: `python make.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
OUT, IN, GROUP = 24, 64, 32
MODULE = "model.layers.0.mlp.up_proj"

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", INT4),
    "w4a16-asym": ("pack-quantized", {**INT4, "symmetric": False}),
    "w4a16-channel": ("pack-quantized", {**INT4, "strategy": "channel", "group_size": None}),
    "w8a16": ("pack-quantized", {**INT4, "num_bits": 8}),
    "w8a8": ("int-quantized", INT8),
    "w8a8-asym": ("int-quantized", {**INT8, "symmetric": False}),
    "w8a8-tensor": ("int-quantized", {**INT8, "strategy": "tensor"}),
    "fp8-dynamic": ("float-quantized", FP8),
    "fp8-tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 32]}),
    "naive-fp8": ("naive-quantized", FP8),
}


def parameters(weight: Any, args: Any) -> tuple[Any, Any]:
    """The scale and zero point of each channel, group, block or tensor, as the library computes them."""
    library = importlib.import_module("compressed_tensors.quantization.utils")
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = library.maybe_pad_tensor_for_block_quant(weight, (rows, columns))
        parts = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        parts = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
        low, high = parts.amin(2), parts.amax(2)
    return library.calculate_qparams(low, high, args)


def make(name: str, kind: str, arguments: dict[str, Any]) -> None:
    import torch

    case = importlib.import_module("case")
    quantization = importlib.import_module("compressed_tensors.quantization")
    compressors = importlib.import_module("compressed_tensors.compressors")
    args = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, format=kind)
    draw = torch.Generator().manual_seed(7)
    weight = (torch.randn(OUT, IN, generator=draw) * 0.1).half()
    state = {"weight": weight}
    state["weight_scale"], state["weight_zero_point"] = parameters(state["weight"], args)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    widened = {**stored, "weight_scale": stored["weight_scale"].float()}
    expected = compressor.decompress(widened, scheme)["weight"]
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=kind, quantization_status="compressed", ignore=["lm_head"]
    )
    settings = json.loads(config.model_dump_json())
    version = f"compressed-tensors {importlib.import_module('compressed_tensors').__version__}"
    tensors = {f"{MODULE}.{key}": value for key, value in stored.items()}
    case.save(HERE / name, settings, tensors, {MODULE: expected}, version)


def main() -> None:
    for name, (kind, arguments) in CASES.items():
        make(name, kind, arguments)


if __name__ == "__main__":
    main()
