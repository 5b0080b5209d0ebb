"""The bytes that a graph stores of a linear layer and of the two ends of a model, without alignment."""

from __future__ import annotations

from vera_edge.errors import PlanError
from vera_edge.plan import DENSE, Step
from vera_edge.weight_rounding import BLOCK

HEADS = ("fp32", "int8", "int4")
_FLOAT = 4


def step_bytes(step: Step) -> int:
    """Codes, scales and zero points of one layer as an ONNX graph holds them.

    Raises PlanError for a format that a graph doesn't hold.
    """
    out, inside = step.shape
    if step.result in DENSE:
        return out * inside * _FLOAT
    if step.result in ("nf4", "fp4"):
        block = int(step.options.get("blocksize", 64))
        return -(-out * inside // 2) + _FLOAT * -(-out * inside // block)
    if step.result in ("int4", "int8"):
        return matrix_bytes(out, inside, step.result)
    raise PlanError(f"{step.module} is {step.result}, which an ONNX graph can't hold; choose other formats")


def matrix_bytes(rows: int, columns: int, kind: str) -> int:
    """A matrix (rows, columns) as "fp32", or in blocks of 32: "int8" symmetric, "int4" with zero points."""
    if kind == "fp32":
        return rows * columns * _FLOAT
    blocks, bits = -(-columns // BLOCK), int(kind.removeprefix("int"))
    zeros = -(-blocks // 2) if bits == 4 else 0
    return rows * (blocks * BLOCK * bits // 8 + blocks * _FLOAT + zeros)
