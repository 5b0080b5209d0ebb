"""The two ends of a language model: the table of token embeddings and the head that gives the logits.

Often they are one matrix (tied embeddings). Quantized, it is stored once all the same: `MatMulNBits` and
`GatherBlockQuantized` read the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from vera_edge.arrays import Float32
from vera_edge.errors import PlanError, TargetError
from vera_edge.formats.blocks import SIZES, IntBlocks, quantize
from vera_edge.plans.plan import Plan
from vera_edge.requantize import Codes, Grid, int_blocks
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.weaver import MICROSOFT, Range, Weaver, leading
from vera_edge_onnx.weights import head_activations
from vera_edge_onnx.weights.linear import Blocks
from vera_edge_onnx.weights.stored import head_block

DTYPES = ("fp32", "fp16", "int8", "int4")
_NAME = "lm_head.weight"
_TABLE = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Ends:
    """The head's MatMul, weight (hidden, vocabulary), and the Gather of the embeddings, (vocabulary, hidden).

    tied: the Gather reads the head's weight through a Transpose.
    """

    head: ir.Node
    gather: ir.Node | None
    tied: bool


def find(model: ir.Model) -> Ends | None:
    """The ends of a decoder graph; None when the logits don't come from a plain product."""
    node = next((value.producer() for value in model.graph.outputs if value.name == "logits"), None)
    while node is not None and node.op_type in ("Add", "Mul", "Div", "Tanh", "Cast"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if (
        node is None
        or node.op_type != "MatMul"
        or node.inputs[1] is None
        or node.inputs[1].const_value is None
    ):
        return None
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    gathers = [user for user in ids.consumers() if user.op_type == "Gather"] if ids is not None else []
    gather = gathers[0] if len(gathers) == 1 else None
    table = gather.inputs[0] if gather is not None else None
    transpose = table.producer() if table is not None else None
    tied = transpose is not None and transpose.inputs[0] is node.inputs[1]
    return Ends(node, gather, tied)


def grid_of(config: Mapping[str, Any], plan: Plan) -> Grid | None:
    """What a head of 4 bits is stored on; None where blocks don't divide the hidden size of a config."""
    hidden = (config.get("text_config") or config).get("hidden_size")
    block = _block(hidden, head_block(plan)) if type(hidden) is int else None
    return None if block is None else int_blocks(4, block, symmetric=False)


def _block(hidden: int, most: int) -> int | None:
    """The largest block of at most so many inputs that divides the hidden size."""
    fitting = [size for size in SIZES if size <= most and not hidden % size]
    return fitting[-1] if fitting else None


def store(
    weaver: Weaver,
    ends: Ends,
    dtype: str,
    block: int,
    codes: Codes | None = None,
    activations: str = head_activations.INT8,
) -> None:
    """Store head and embeddings as `dtype`: "fp32" (as they are), "fp16", "int8" or "int4".

    codes: of the head, where it was rounded with care; tied embeddings are those then, others are rounded to
    nearest. The lookup has no short blocks: where `block` doesn't divide the hidden size, the largest that is
    smaller and does is taken; without one they are left as they are. activations: what the head's integers
    are multiplied with is rounded to, "int8" by the kernel or "int16". Raises TargetError when the codes
    aren't of the head that the graph has.
    """
    if dtype not in DTYPES:
        raise PlanError(f"the head can't be stored as {dtype!r}; choose from {', '.join(DTYPES)}")
    if dtype in ("fp32", "fp16"):
        _store_floats(weaver, ends, dtype)
        return
    head, gather = ends.head.inputs[1], ends.gather.inputs[0] if ends.gather is not None else None
    assert head is not None and head.const_value is not None
    fitting = _block(head.const_value.shape.numpy()[0], block)
    if fitting is None:
        return
    block = fitting
    if codes is not None:
        blocks = _careful(codes, head.const_value, dtype, block)
    else:
        blocks = quantized(head.const_value, dtype, block, transposed=True)
    x, name = ends.head.inputs[0], f"{_NAME}.{dtype}"
    assert x is not None
    if ends.gather is not None:
        if ends.tied:
            look_up(weaver, ends.gather, blocks, _NAME)
            form = blocks.form
            stored = (*form.scales.shape, form.block * form.bits // 8)
            weaver.alias(name, weaver.model.graph.initializers[f"{name}.rows"], stored)
        elif gather is not None and gather.const_value is not None:
            look_up(weaver, ends.gather, quantized(gather.const_value, dtype, block), _TABLE)
    product = _multiply(weaver, ends.head, x, blocks, activations == head_activations.INT16)
    weaver.take_over(ends.head, product)


def _store_floats(weaver: Weaver, ends: Ends, dtype: str) -> None:
    """Store head and embeddings as they are, or as "fp16"; tied ones as the lookup reads them.

    The builder has tied ones as the head's product reads them, and transposes them for the lookup. A runtime
    does that once, when it opens the graph, and holds the whole table twice then.
    """
    head, gather = ends.head.inputs[1], ends.gather.inputs[0] if ends.gather is not None else None
    if ends.tied:
        head = gather = _share_table(weaver, ends)
    if dtype == "fp16":
        for value in dict.fromkeys((head, gather)):
            if value is not None and value.const_value is not None:
                weaver.narrow(value, _first_use(weaver, value))


def _share_table(weaver: Weaver, ends: Ends) -> ir.Value:
    """The table (vocabulary, hidden) that both ends of a tied graph then read."""
    x, weight = ends.head.inputs[:2]
    assert x is not None and weight is not None and weight.const_value is not None and ends.gather is not None
    table = weaver.as_factor(_TABLE, weight.const_value, transposed=True)
    ends.gather.replace_input_with(0, table)
    shape = (*leading(x), weight.const_value.shape.numpy()[1])
    name = "/lm_head/FusedMatMul"
    product = weaver.node(
        "FusedMatMul", [x, table], name, shape, before=ends.head, domain=MICROSOFT, transB=1
    )
    weaver.take_over(ends.head, product)
    return table


def _multiply(weaver: Weaver, head: ir.Node, x: ir.Value, blocks: Blocks, two_rows: bool) -> ir.Value:
    """The logits (..., vocabulary) of x (..., hidden)."""
    if not two_rows:
        return blocks.product(weaver, x, _NAME, "/lm_head", head)
    vocabulary, hidden = blocks.shape
    rows = head_activations.two_rows(weaver, x, hidden, blocks.form.block, head)
    products = blocks.product(weaver, rows, _NAME, "/lm_head", head)
    return head_activations.summed(weaver, products, vocabulary, head)


def _careful(codes: Codes, tensor: ir.TensorProtocol, dtype: str, block: int) -> Blocks:
    """Codes of a head (vocabulary, hidden) as the graph's blocks; `tensor`: its weight, transposed."""
    hidden, vocabulary = tensor.shape.numpy()
    form = codes.int_blocks()
    if codes.shape != (vocabulary, hidden) or (form.bits, form.block) != (int(dtype[3:]), block):
        raise TargetError(
            f"the graph's output head is {vocabulary} x {hidden}, and the one that was rounded "
            f"{codes.shape[0]} x {codes.shape[1]}; choose --head int8"
        )
    return Blocks(form)


def quantized(tensor: ir.TensorProtocol, dtype: str, block: int, transposed: bool = False) -> Blocks:
    """A float matrix as "int8" or "int4" in blocks along its rows; along its columns where it's transposed.

    One that is computed when it's read is never whole in memory.
    """
    bits = int(dtype.removeprefix("int"))
    if isinstance(tensor, ComputedWeight) and tensor.transposed == transposed:
        out, inside = tensor.matrix_shape
        count = inside // block
        codes, scales = np.empty((out, count, block), np.uint8), np.empty((out, count), np.float32)
        zeros = None if bits == 8 else np.empty((out, count), np.uint8)
        for start, rows in tensor.pieces():
            here, piece = slice(start, start + len(rows)), quantize(rows, bits, block, symmetric=bits == 8)
            codes[here], scales[here] = piece.codes, piece.scales
            if zeros is not None and piece.zero_points is not None:
                zeros[here] = piece.zero_points
        return Blocks(IntBlocks(bits, inside, codes, scales, zeros))
    weight: Float32 = tensor.numpy()
    return Blocks(quantize(weight.T if transposed else weight, bits, block, symmetric=bits == 8))


def look_up(
    weaver: Weaver, gather: ir.Node, blocks: Blocks, name: str, node: str = "/model/embed_tokens"
) -> None:
    """Replace a Gather by one that dequantizes the rows it takes; `node`: its name without the operator."""
    ids, rows = gather.inputs[1], blocks.shape[0]
    assert ids is not None
    codes, *others = blocks.arrays(name).items()
    table = weaver.initializer(f"{codes[0]}.rows", codes[1].reshape(rows, -1))
    if name == _NAME:
        weaver.shared[f"{codes[0]}.rows"] = Range(codes[0])
    inputs = [weaver.initializer(*other) for other in others]
    shape = (*leading(gather.outputs[0]), blocks.shape[1])
    found = weaver.node(
        "GatherBlockQuantized",
        [table, ids, *inputs],
        f"{node}/GatherBlockQuantized",
        shape,
        before=gather,
        domain=MICROSOFT,
        bits=blocks.form.bits,
        block_size=blocks.form.block,
        gather_axis=0,
        quantize_axis=1,
    )
    weaver.take_over(gather, found)


def _first_use(weaver: Weaver, value: ir.Value) -> ir.Node:
    users = set(value.consumers())
    return next(node for node in weaver.model.graph if node in users)
