"""Makes the golden GPTQ checkpoints with GPTQModel's own torch layer; the values are what that layer
dequantizes to.

Run with GPTQModel 7 installed: `python make.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
IN, OUT, GROUP = 64, 32, 32
MODULE = "model.layers.0.mlp.up_proj"


def grid(weight: Any, bits: int, sym: bool, index: Any) -> tuple[Any, Any]:
    """Scales and zeros (out, groups) of each group's range."""
    import torch

    scales, zeros = [], []
    for group in range(IN // GROUP):
        part = weight[:, index == group]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / (2**bits - 1)).half().float()
        scales.append(scale)
        zeros.append(torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low / scale))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def make(bits: int, sym: bool, act_order: bool, version: str) -> None:
    import torch

    case = importlib.import_module("case")
    layers = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    model = importlib.import_module("gptqmodel.utils.model")
    backend = importlib.import_module("gptqmodel.utils.backend").BACKEND.TORCH
    draw = torch.Generator().manual_seed(100 * bits + 10 * sym + act_order)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.randn(OUT, IN, generator=draw) * 0.1
    if not sym:
        linear.weight.data[0] = linear.weight.data[0].abs()  # a zero point of 0, which v1 stores as -1
        linear.weight.data[1] = -linear.weight.data[1].abs()
    index = torch.arange(IN) // GROUP
    if act_order:
        index = index[torch.randperm(IN, generator=draw)]
    scales, zeros = grid(linear.weight.data, bits, sym, index)
    layer = layers.TorchLinear(
        bits=bits, group_size=GROUP, sym=sym, desc_act=act_order, in_features=IN, out_features=OUT,
        bias=False, pack_dtype=torch.int32, backend=backend, adapter=None, register_buffers=True,
    )  # fmt: skip
    layer.pack_original(linear, scales, zeros, index.to(torch.int32))
    # float16 times a whole number is exact in float32, so this is what the checkpoint says
    half = layer.scales
    layer.scales = half.float()
    layer.post_init()
    expected = layer.dequantize_weight().T.clone()
    layer.scales = half
    if version == "gptq":
        model.convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": sym, "desc_act": act_order,
        "checkpoint_format": version, "pack_dtype": "int32", "lm_head": False,
    }  # fmt: skip
    names = ("qweight", "qzeros", "scales", "g_idx")
    tensors = {f"{MODULE}.{name}": getattr(layer, name) for name in names}
    name = f"b{bits}-{'sym' if sym else 'asym'}{'-actorder' if act_order else ''}-{version}"
    version_text = f"gptqmodel {importlib.import_module('gptqmodel').__version__}"
    case.save(HERE / name, config, tensors, {MODULE: expected}, version_text)


def main() -> None:
    for bits in (2, 3, 4, 8):
        make(bits, sym=True, act_order=False, version="gptq")
        make(bits, sym=False, act_order=True, version="gptq_v2")
    make(3, sym=False, act_order=False, version="gptq_v2")
    make(4, sym=False, act_order=True, version="gptq")


if __name__ == "__main__":
    main()
