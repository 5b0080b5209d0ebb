"""Makes the golden AWQ checkpoint with AutoAWQ's own GEMM layer; the values are AutoAWQ's dequantization in
float32.

Run with AutoAWQ 0.2 importable: `python make.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
IN, OUT, GROUP = 64, 32, 32
MODULE = "model.layers.0.mlp.up_proj"


def main() -> None:
    import torch

    case = importlib.import_module("case")
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    draw = torch.Generator().manual_seed(4)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.randn(OUT, IN, generator=draw) * 0.1
    groups = linear.weight.data.reshape(OUT, IN // GROUP, GROUP)
    scales = ((groups.amax(2) - groups.amin(2)) / 15).half().float()
    zeros = torch.clamp(-torch.round(groups.amin(2) / scales), 0, 15)
    layer = gemm.WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    expected = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    tensors = {f"{MODULE}.{name}": getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    case.save(HERE / "gemm", config, tensors, {MODULE: expected}, "autoawq 0.2.9")


if __name__ == "__main__":
    main()
