"""Makes the golden HQQ checkpoints with hqq's own layer; the values are hqq's dequantization in float32.

Run with hqq 0.2 installed: `python make.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
OUT, IN = 40, 32
MODULE = "model.layers.0.mlp.up_proj"


def make(bits: int, group: int, axis: int, as_float: bool = False) -> None:
    import torch

    case = importlib.import_module("case")
    hqq = importlib.import_module("hqq.core.quantize")
    torch.manual_seed(bits)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    settings = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=as_float)
    layer = hqq.HQQLinear(linear, settings, compute_dtype=torch.float16, device="cpu")
    tensors = {f"{MODULE}.{key}": value for key, value in layer.state_dict().items()}
    meta = {**layer.meta, "compute_dtype": torch.float32}
    meta["scale"], meta["zero"] = meta["scale"].float(), meta["zero"].float()
    expected = hqq.Quantizer.dequantize(layer.W_q.data, meta)
    config = {"quant_method": "hqq", "skip_modules": ["lm_head"], "quant_config": settings}
    version = f"hqq {importlib.import_module('importlib.metadata').version('hqq')}"
    name = f"b{bits}-g{group}-axis{axis}{'-float' if as_float else ''}"
    case.save(HERE / name, config, tensors, {MODULE: expected}, version)


def main() -> None:
    for bits in (1, 2, 3, 4, 8):
        make(bits, 16, 1)
    make(4, 64, 0)
    make(3, 64, 0)
    make(4, 64, 1)
    make(4, 64, 1, as_float=True)


if __name__ == "__main__":
    main()
