"""Products that give a row other bits when several rows are multiplied at once.

MLAS has a kernel for one row and others for two or four. With blocks of 32 values they add up in the same
order; with longer ones, and in floats, they don't, and the last bit of a sum differs. Which kernel runs is up
to the processor, so it is asked by multiplying once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnxruntime

from vera_edge.device.runtime import onnx_message as message

_OUT = 64  # outputs of a probe: whole tiles of every kernel
_ROWS = 8  # tried at once, and those before it


@dataclass(frozen=True)
class BlockProduct:
    """What decides the kernel of a MatMulNBits beside the processor; width: inputs, in blocks of `block`."""

    width: int
    block: int
    bits: int
    accuracy: int
    zero_points: bool


@cache
def alike(product: BlockProduct) -> bool:
    """Whether each of 2 to 8 rows gives, bit for bit, what it gives alone. False for what can't be run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(_probe(product), options, providers=["CPUExecutionProvider"])
        x = np.random.default_rng(0).standard_normal((_ROWS, product.width), np.float32)
        alone = np.concatenate([session.run(None, {"x": x[row : row + 1]})[0] for row in range(_ROWS)])
        return all(
            np.array_equal(session.run(None, {"x": x[:rows]})[0], alone[:rows])
            for rows in range(2, _ROWS + 1)
        )
    except Exception:  # onnxruntime's classes share no base but Exception
        return False


def _probe(product: BlockProduct) -> bytes:
    """An ONNX model: x (rows, width) times random codes (64, width)."""
    draw, blocks = np.random.default_rng(1), -(-product.width // product.block)
    tensors = {
        "codes": draw.integers(0, 256, (_OUT, blocks, product.block * product.bits // 8), np.uint8),
        "scales": draw.random(_OUT * blocks, np.float32),
    }
    if product.zero_points:
        tensors["zeros"] = draw.integers(0, 256, _OUT * -(-blocks * product.bits // 8), np.uint8)
    sizes = {"K": product.width, "N": _OUT, "bits": product.bits, "block_size": product.block}
    sizes["accuracy_level"] = product.accuracy
    graph = message.field(
        1, message.node("MatMulNBits", ["x", *tensors], "y", sizes, domain=message.MICROSOFT)
    )
    graph += message.field(2, "probe")
    graph += b"".join(message.field(5, message.constant(name, array)) for name, array in tensors.items())
    graph += message.field(11, message.port("x", message.FLOAT, (None, product.width)))
    graph += message.field(12, message.port("y", message.FLOAT, (None, _OUT)))
    return message.model(graph, {"": 18, message.MICROSOFT: 1})
