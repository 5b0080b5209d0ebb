"""What the kernels of torch and ONNX Runtime do on this processor, where tests have to allow for either."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch


@cache
def torch_fuses() -> bool:
    """Whether `uniform_` rounds `draw * span + low` once, as kernels with fused multiply-add do, or twice."""
    low, high = np.float32(-0.3), np.float32(0.3)
    span = np.float32(high - low)
    found = torch.empty(4096).uniform_(float(low), float(high), generator=torch.Generator().manual_seed(5))
    draws = torch.rand(4096, generator=torch.Generator().manual_seed(5)).numpy()
    twice = draws * span + low
    # Products of two float32 are exact in float64, and their sums with a third are near enough.
    once = (draws.astype(np.float64) * span + low).astype(np.float32)
    near = [(found.numpy() == expected).mean() for expected in (twice, once)]
    assert max(near) > 0.999 and min(near) < 0.9, near
    return bool(near[1] > near[0])


@cache
def blocks_round_inputs() -> bool:
    """Whether `MatMulNBits` at accuracy level 4 rounds what it reads; on x86 it takes AVX2 for that."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = [
        numpy_helper.from_array(np.full((16, 2, 32), 129, np.uint8), "codes"),  # ones, since 128 is zero
        numpy_helper.from_array(np.ones(32, np.float32), "scales"),
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=64,
        N=16,
        bits=8,
        block_size=32,
        accuracy_level=4,
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], weights), opset_imports=opsets)
    model.ir_version = 10
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(
            Path(folder) / "model.onnx", providers=["CPUExecutionProvider"]
        )
    values = np.full((1, 64), 0.3, np.float32)  # 38.1 steps of 127
    values[0, ::32] = 1
    (product,) = session.run(None, {"x": values})
    return bool(np.abs(product - values.sum()).max() > 1e-3)
