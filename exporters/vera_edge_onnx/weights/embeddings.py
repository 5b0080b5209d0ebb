"""The table of token embeddings of an encoder: often half of a small model's bytes."""

from __future__ import annotations

import onnx_ir as ir

from vera_edge.errors import PlanError
from vera_edge_onnx.graph.weaver import Weaver
from vera_edge_onnx.weights import head, qdq


def store(weaver: Weaver, dtype: str, block: int, by_row: bool = False) -> None:
    """Store the table that `input_ids` look up as `dtype`: "fp32" (as it is), "fp16", "int8" or "int4".

    by_row: int8 with one scale for each token, in ONNX's own operators. A hidden size that the block doesn't
    divide is left as it is otherwise: the lookup has no short blocks.
    """
    if dtype not in head.DTYPES:
        raise PlanError(f"embeddings can't be stored as {dtype!r}; choose from {', '.join(head.DTYPES)}")
    ids = next((value for value in weaver.model.graph.inputs if value.name == "input_ids"), None)
    for gather in list(ids.consumers()) if ids is not None and dtype != "fp32" else ():
        table = gather.inputs[0] if gather.op_type == "Gather" else None
        if table is None or table.const_value is None or table.dtype != ir.DataType.FLOAT:
            continue
        name = table.name or "embeddings.weight"
        if dtype == "fp16":
            weaver.narrow(table, gather)
        elif dtype == "int8" and by_row:
            qdq.look_up(weaver, gather, qdq.RowCodes.nearest(table.const_value.numpy()), name)
        elif not table.const_value.shape.numpy()[1] % block:
            blocks = head.quantized(table.const_value, dtype, block)
            head.look_up(weaver, gather, blocks, name, name.removesuffix(".weight"))
