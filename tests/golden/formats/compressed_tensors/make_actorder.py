"""Makes the golden checkpoint with activation ordering, which compressed-tensors wrote up to 0.14 or so.

The values are what the library's `dequantize` gives with the scales widened to float32.
Run with compressed-tensors 0.11 installed: `python make_actorder.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
OUT, IN, GROUP = 24, 64, 32
MODULE = "model.layers.0.mlp.up_proj"


def main() -> None:
    import torch

    case = importlib.import_module("case")
    quantization = importlib.import_module("compressed_tensors.quantization")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    packing = importlib.import_module("compressed_tensors.compressors.quantized_compressors.pack_quantized")
    args = quantization.QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True, actorder="group"
    )
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(OUT, IN, generator=draw) * 0.1
    index = (torch.arange(IN) // GROUP).to(torch.int32)[torch.randperm(IN, generator=draw)]
    scale = torch.stack([weight[:, index == group].abs().amax(1) / 7.5 for group in range(IN // GROUP)], 1)
    scale = scale.to(torch.bfloat16)
    zero = torch.zeros_like(scale)
    codes = forward.quantize(weight, scale.float(), zero.float(), args, torch.int8, g_idx=index)
    expected = forward.dequantize(codes, scale.float(), zero.float(), args, torch.float32, g_idx=index)
    tensors = {
        "weight_packed": packing.pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": index,
    }
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed"
    )
    settings = json.loads(config.model_dump_json())
    version = f"compressed-tensors {importlib.import_module('compressed_tensors').__version__}"
    named = {f"{MODULE}.{key}": value for key, value in tensors.items()}
    case.save(HERE / "w4a16-actorder", settings, named, {MODULE: expected}, version)


if __name__ == "__main__":
    main()
