"""Measure what forms of a LoRA's pairs cost as inputs of a graph: CPU time of one token, without its base.

    scripts/bench_pairs [--rank 16] [--layers 40] [--rounds 5]

A chain of layers of a Llama of hidden size 2048 with nothing but their pairs, so many that no cache holds
them: beside a base's weights there is no room in one either. The base's own products are measured as a
chain of int4 weights. Time is that of one thread on the processor, and the least of all rounds, so that
what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

HIDDEN, KEYS, INNER = 2048, 512, 8192
BLOCK = 32
FORMS = ("base, int4", "float32", "float32, A's stacked", "float16", "int8 in blocks")
_MICROSOFT = "com.microsoft"


@dataclass
class _Chain:
    """A graph under construction, and what is fed to it."""

    form: str
    rank: int
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    feeds: dict[str, Any] = field(default_factory=dict)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def constant(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def given(self, name: str, values: Any) -> str:
        """An input with zeros for a default, as a branch has it."""
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, ["rows", *values.shape[1:]]))
        self.constant(name, np.zeros_like(values))
        self.feeds[name] = values
        return name

    def matrix(self, name: str, shape: tuple[int, int]) -> str:
        """Half of a pair as float32, whatever it is given as."""
        values = (self.draw.standard_normal((1, *shape)) * 0.01).astype(np.float32)
        if self.form == "float16":
            given = self.given(name, values.astype(np.float16))
            return self.node("Cast", [given], [f"{name}.wide"], to=TensorProto.FLOAT)
        if self.form == "int8 in blocks":
            block = min(BLOCK, shape[0])
            codes = self.given(name, self.draw.integers(-127, 127, (1, *shape)).astype(np.int8))
            scales = self.given(f"{name}.scales", np.full((1, shape[0] // block, shape[1]), 1e-4, np.float32))
            inputs = [codes, scales]
            return self.node("DequantizeLinear", inputs, [f"{name}.wide"], axis=1, block_size=block)
        return self.given(name, values)

    def linears(self, x: str, inside: int, widths: list[int], name: str) -> str:
        """Layers that read the same x, side by side."""
        if self.form == FORMS[0]:
            return self.base(x, inside, sum(widths), name)
        stacked = self.form == "float32, A's stacked" and len(widths) > 1
        downs = self.stacked(x, inside, len(widths), name) if stacked else []
        ups = []
        for number, width in enumerate(widths):
            if not stacked:
                a = self.matrix(f"{name}.A{number}", (inside, self.rank))
                downs.append(self.node("MatMul", [x, a], [f"{name}.down{number}"]))
            b = self.matrix(f"{name}.B{number}", (self.rank, width))
            ups.append(self.node("MatMul", [downs[number], b], [f"{name}.up{number}"]))
        return ups[0] if len(ups) == 1 else self.node("Concat", ups, [f"{name}.up"], axis=-1)

    def stacked(self, x: str, inside: int, count: int, name: str) -> list[str]:
        a = self.matrix(f"{name}.A", (inside, self.rank * count))
        wide = self.node("MatMul", [x, a], [f"{name}.down"])
        return self.split(wide, [self.rank] * count, name)

    def base(self, x: str, inside: int, out: int, name: str) -> str:
        blocks = (out, inside // BLOCK)
        codes = self.draw.integers(0, 256, (*blocks, BLOCK // 2)).astype(np.uint8)
        scales = np.full(blocks, 1e-3, np.float32)
        inputs = [x, self.constant(f"{name}.codes", codes), self.constant(f"{name}.scales", scales)]
        shape = {"K": inside, "N": out, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self.node("MatMulNBits", inputs, [f"{name}.product"], domain=_MICROSOFT, **shape)

    def split(self, value: str, sizes: list[int], name: str) -> list[str]:
        ends = self.constant(f"{name}.sizes", np.array(sizes, np.int64))
        parts = [f"{name}.part{number}" for number in range(len(sizes))]
        self.node("Split", [value, ends], parts, axis=-1)
        return parts

    def layer(self, x: str, name: str) -> str:
        query, *_ = self.split(
            self.linears(x, HIDDEN, [HIDDEN, KEYS, KEYS], f"{name}.qkv"), [HIDDEN, 2 * KEYS], name
        )
        x = self.linears(query, HIDDEN, [HIDDEN], f"{name}.o")
        gate, up = self.split(
            self.linears(x, HIDDEN, [INNER, INNER], f"{name}.mlp"), [INNER, INNER], f"{name}.gate"
        )
        return self.linears(self.node("Mul", [gate, up], [f"{name}.inner"]), INNER, [HIDDEN], f"{name}.down")


def _seconds(form: str, rank: int, layers: int, rounds: int) -> float:
    """CPU seconds of one token in one layer, the least of all rounds."""
    chain, x = _Chain(form, rank), "x"
    chain.inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 1, HIDDEN]))
    for number in range(layers):
        x = chain.layer(x, f"layer{number}")
    out = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
    graph = helper.make_graph(chain.nodes, "chain", chain.inputs, [out], chain.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {"x": np.ones((1, 1, HIDDEN), np.float32), **chain.feeds}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    taken = []
    for _ in range(rounds + 1):
        began = time.thread_time()
        session.run_with_ort_values(None, values)
        taken.append(time.thread_time() - began)
    return min(taken[1:]) / layers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=40, help="of pairs; of the base a tenth of them")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("| pairs as | microseconds of a layer |\n|---|--:|")
    for form in FORMS:
        layers = max(1, given.layers // 10) if form == FORMS[0] else given.layers
        print(f"| {form} | {1e6 * _seconds(form, given.rank, layers, given.rounds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
