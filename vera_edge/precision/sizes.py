"""The bytes that a graph stores of a linear layer and of the two ends of a model, without alignment."""

from __future__ import annotations

from vera_edge.errors import PlanError
from vera_edge.plans.plan import DENSE, Step
from vera_edge.requantize import Grid, int_blocks
from vera_edge.rounding.weight_rounding import BLOCK, grid_of

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
    if step.result in ("int4", "int8") and (grid := grid_of(step, exported=True)) is not None:
        return _block_bytes(out, inside, grid)
    raise PlanError(f"{step.module} is {step.result}, which an ONNX graph can't hold; choose other formats")


def matrix_bytes(rows: int, columns: int, kind: str) -> int:
    """A matrix (rows, columns) as "fp32", or in blocks of 32: "int8" symmetric, "int4" with zero points."""
    if kind == "fp32":
        return rows * columns * _FLOAT
    return _block_bytes(rows, columns, int_blocks(int(kind.removeprefix("int")), BLOCK, kind == "int8"))


def _block_bytes(rows: int, columns: int, grid: Grid) -> int:
    blocks = -(-columns // grid.block)
    zeros = 0 if grid.symmetric else -(-blocks * grid.bits // 8)
    return rows * (blocks * grid.block * grid.bits // 8 + blocks * _FLOAT + zeros)
