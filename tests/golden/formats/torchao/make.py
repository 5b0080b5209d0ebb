"""Makes the golden torchao checkpoints: quantized and flattened by torchao, as transformers does on saving.

The values are torchao's own dequantization to float32. Int4Tensor is filled by a kernel that needs a GPU, so
that its case is filled here, by the published rule, and its values are the rule's: `scale * q + zero`.
Run with torchao 0.18 installed: `python make.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
OUT, IN, GROUP = 24, 64, 32
MODULE = "model.layers.0.mlp.up_proj"


def save(name: str, weight: Any, expected: Any) -> None:
    case = importlib.import_module("case")
    support = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    tensors, metadata = support.flatten_tensor_state_dict({f"{MODULE}.weight": weight})
    version = f"torchao {importlib.import_module('torchao').__version__}"
    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": name}}}
    case.save(HERE / name, config, tensors, {MODULE: expected}, version, metadata)


def quantized(config: Any) -> Any:
    import torch

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False)).to(torch.bfloat16)
    importlib.import_module("torchao.quantization").quantize_(model, config)
    return model[0].weight.data


def main() -> None:
    import torch

    ao = importlib.import_module("torchao.quantization")
    affine = importlib.import_module("torchao.quantization.quant_primitives")
    int8 = quantized(ao.Int8WeightOnlyConfig(version=2))
    save("int8-weight-only", int8, int8.dequantize(torch.float32))
    fp8 = quantized(ao.Float8WeightOnlyConfig())
    save("float8-weight-only", fp8, fp8.dequantize(torch.float32))
    for name, mapping in (
        ("intx-int4", ao.MappingType.SYMMETRIC),
        ("intx-int4-asym", ao.MappingType.ASYMMETRIC),
    ):
        int4_dtype: Any = vars(torch)["int4"]
        config = ao.IntxWeightOnlyConfig(int4_dtype, granularity=ao.PerGroup(GROUP), mapping_type=mapping)
        intx = quantized(config)
        expected = affine.dequantize_affine(
            intx.qdata,
            intx.block_size,
            intx.scale.float(),
            intx.zero_point,
            torch.int8,
            output_dtype=torch.float32,
        )
        save(name, intx, expected)
    draw = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (OUT, IN), generator=draw, dtype=torch.int8)
    packed = codes[:, ::2] & 15 | codes[:, 1::2] << 4
    scale = (torch.rand(IN // GROUP, OUT, generator=draw) * 0.1).to(torch.bfloat16)
    zero = torch.randn(IN // GROUP, OUT, generator=draw).to(torch.bfloat16)
    int4 = ao.Int4Tensor(packed, scale, zero, [1, GROUP], torch.Size([OUT, IN]))
    wide = [part.float().T.repeat_interleave(GROUP, 1) for part in (scale, zero)]
    save("int4-tensor", int4, wide[0] * codes + wide[1])


if __name__ == "__main__":
    main()
