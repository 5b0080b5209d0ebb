"""Puts rotary position tables into a decoder's graph, in place of those that its builder computed.

Where the tables depend on the length of the sequence, the graph chooses by it. A runtime that feeds a prompt
in pieces must then say how long the whole is, or the first pieces would be rotated as a short text's: the
graph input ROPE_LENGTH, 0 when it isn't given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vera_edge.device.runtime.decoding import ROPE_KIND, ROPE_LENGTH, ROPE_SWITCH
from vera_edge_onnx.decoder.rotary import Growth, Rotary, RotaryTable, module_of, tables_of
from vera_edge_onnx.graph.weaver import Weaver

_LAYER = re.compile(r"layers\.(\d+)/")
_OPERATORS = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}  # where cos and sin are read


def put_in(model: ir.Model, config: Any, architecture: str) -> None:
    """Give every attention of `model` the tables that transformers computes for `config`.

    config: a transformers text config. Raises TargetError when the module that computes them isn't one that
    can be run here.
    """
    rotary = module_of(config, architecture)
    if rotary is None:
        return
    edits = Weaver(model)
    for (cos, sin), layers in _layers_by_table(model).items():
        tables = tables_of(config, architecture, layers, rotary)
        _replace(edits, cos, sin, tables)
        if tables.switch is not None:
            kind = "longrope" if isinstance(tables.beyond, RotaryTable) else "dynamic"
            model.metadata_props.update({ROPE_KIND: kind, ROPE_SWITCH: str(tables.switch)})
    model.graph.sort()


def _layers_by_table(model: ir.Model) -> dict[tuple[ir.Value, ir.Value], list[int]]:
    """Which layers read which cos and sin."""
    found: dict[tuple[ir.Value, ir.Value], list[int]] = {}
    for node in model.graph:
        places = _OPERATORS.get(node.op_type, ())
        if not places or len(node.inputs) <= places[1]:
            continue
        cos, sin = (node.inputs[place] for place in places)
        match = _LAYER.search(node.name or "")
        if cos is not None and sin is not None and match is not None:
            found.setdefault((cos, sin), []).append(int(match[1]))
    return found


def _replace(edits: Weaver, cos: ir.Value, sin: ir.Value, rotary: Rotary) -> None:
    users = [node for node in edits.model.graph if cos in node.inputs or sin in node.inputs]
    names = [_plain(value.name or half) for value, half in ((cos, "cos_cache"), (sin, "sin_cache"))]
    if rotary.beyond is None:
        new: Sequence[ir.Value] = [
            edits.initializer(f"{name}.table", half) for name, half in zip(names, rotary.table, strict=True)
        ]
    else:
        new = _chosen_by_length(edits, names, rotary, users[0])
    for old, value in zip((cos, sin), new, strict=True):
        for node in users:
            for place, read in enumerate(node.inputs):
                if read is old:
                    node.replace_input_with(place, value)


def _plain(name: str) -> str:
    return name.rpartition("/")[2]


def _chosen_by_length(
    edits: Weaver, names: Sequence[str], rotary: Rotary, before: ir.Node
) -> Sequence[ir.Value]:
    """cos and sin as far as the sequence goes, of the table for its length."""
    scope = f"/model/{names[0]}"
    total, longest = _lengths(edits, before)
    switch = edits.initializer(f"{names[0]}.switch", np.array([rotary.switch], np.int64))
    condition = edits.node("Greater", [longest, switch], f"{scope}/Greater", (1,), before=before,
                           dtype=ir.DataType.BOOL)  # fmt: skip
    short = [edits.initializer(f"{name}.short", half) for name, half in zip(names, rotary.table, strict=True)]
    if isinstance(rotary.beyond, RotaryTable):
        long = [
            edits.initializer(f"{name}.long", half) for name, half in zip(names, rotary.beyond, strict=True)
        ]
        then = _first_rows(long, total, "long")
    else:
        assert rotary.beyond is not None
        then = _grown(edits, names[0], rotary.beyond, total, longest)
    width = rotary.table.cos.shape[1]
    made = {f"{name}.chosen": (("total_sequence_length", width), ir.DataType.FLOAT) for name in names}
    return edits.outputs(
        "If", [condition], f"{scope}/If", made, before=before,
        then_branch=then, else_branch=_first_rows(short, total, "short"),
    )  # fmt: skip


def _lengths(edits: Weaver, before: ir.Node) -> tuple[ir.Value, ir.Value]:
    """(total, longest), each (1,): the tokens that the run sees, and those that the whole sequence has."""
    mask = next(value for value in edits.model.graph.inputs if value.name == "attention_mask")
    scope, int64 = "/model/rope_length", ir.DataType.INT64
    total = edits.node("Shape", [mask], f"{scope}/Shape", (1,), before=before, dtype=int64, start=1, end=2)
    told = edits.overridable(ROPE_LENGTH, np.zeros(1, np.int64))
    longest = edits.node("Max", [total, told], f"{scope}/Max", (1,), before=before, dtype=int64)
    return total, longest


def _first_rows(tables: Sequence[ir.Value], total: ir.Value, name: str) -> ir.Graph:
    """A branch that gives the rows of `tables` that a sequence needs."""
    zero = _constant("start", np.array([0], np.int64), name)
    cuts = [
        ir.node("Slice", [table, zero.outputs[0], total, zero.outputs[0]], name=f"/{name}/{half}/Slice")
        for half, table in zip(("cos", "sin"), tables, strict=True)
    ]
    return _branch([zero, *cuts], cuts, name)


def _grown(edits: Weaver, name: str, growth: Growth, total: ir.Value, longest: ir.Value) -> ir.Graph:
    """A branch that computes cos and sin as transformers' dynamic NTK scaling does.

    base' = base * (factor * length / original - (factor - 1)) ** (d / (d - 2)), for d rotated dimensions.
    """
    dimensions = growth.dimensions
    constants: dict[str, npt.NDArray[Any]] = {
        "ratio": np.array([growth.factor / growth.original], np.float32),
        "less": np.array([growth.factor - 1], np.float32),
        "power": np.array([dimensions / (dimensions - 2)], np.float32),
        "theta": np.array([growth.theta], np.float32),
        "exponents": growth.exponents,
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "axis": np.array([1], np.int64),
        "scalar": np.array([], np.int64),
    }
    nodes = {key: _constant(key, value, "grown") for key, value in constants.items()}

    def add(key: str, op: str, *inputs: str | ir.Value, **attributes: Any) -> None:
        read = [nodes[each].outputs[0] if isinstance(each, str) else each for each in inputs]
        nodes[key] = ir.node(op, read, attributes, name=f"/grown/{key}/{op}")

    add("length", "Cast", longest, to=ir.DataType.FLOAT)
    add("scaled", "Mul", "length", "ratio")
    add("growth", "Sub", "scaled", "less")
    add("stretch", "Pow", "growth", "power")
    add("base", "Mul", "stretch", "theta")
    add("frequencies", "Pow", "base", "exponents")
    add("count", "Reshape", total, "scalar")
    add("whole", "Range", "zero", "count", "one")
    add("positions", "Cast", "whole", to=ir.DataType.FLOAT)
    add("column", "Unsqueeze", "positions", "axis")
    add("angles", "Mul", "column", "frequencies")
    add("cos", "Cos", "angles")
    add("sin", "Sin", "angles")
    return _branch(list(nodes.values()), [nodes["cos"], nodes["sin"]], "grown")


def _constant(key: str, value: npt.NDArray[Any], scope: str) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(value)}, name=f"/{scope}/{key}/Constant")


def _branch(nodes: Sequence[ir.Node], last: Sequence[ir.Node], name: str) -> ir.Graph:
    for node in nodes:
        node.outputs[0].name = f"{node.name}/output_0"
    for node in last:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [node.outputs[0] for node in last], nodes=nodes, name=name)
