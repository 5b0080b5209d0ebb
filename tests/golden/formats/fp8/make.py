"""Makes the golden FP8 checkpoints: stored by torch's own E4M3 cast, widened by transformers' own function.

Run with transformers 5.23 installed: `python make.py`. Not needed for the tests.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
OUT, IN = 40, 72
MODULE = "model.layers.0.mlp.up_proj"


def make(name: str, block: list[int] | None) -> None:
    import torch
    import transformers

    case = importlib.import_module("case")
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    draw = torch.Generator().manual_seed(8)
    weight = torch.randn(OUT, IN, generator=draw) * torch.rand(OUT, 1, generator=draw)
    weight[3, 5] = 1e-6  # a subnormal code
    rows, columns = block or [OUT, IN]
    scales = torch.empty(-(-OUT // rows), -(-IN // columns))
    codes = torch.empty(OUT, IN, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    scale: Any = scales if block else scales.reshape(())
    expected = fp8._dequantize_fp8_weight(codes.clone(), scale, block, torch.float32)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale_inv": scale}
    case.save(HERE / name, config, tensors, {MODULE: expected}, f"transformers {transformers.__version__}")


def main() -> None:
    make("block", [32, 32])
    make("tensor", None)


if __name__ == "__main__":
    main()
