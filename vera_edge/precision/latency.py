"""How long a layer's product takes in each format: one token, in ONNX Runtime, on this machine.

Generating text multiplies one row with every weight of the model once, so weights come from memory and not
from a cache. Each kind of product is therefore timed over many weights of its shape, one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.cores import available_cores
from vera_edge.plans.plan import DENSE, Step
from vera_edge.rounding.weight_rounding import BLOCK

# More than the last level of most caches, and as much as a small model's layers of one shape.
_BYTES = 64 << 20
_COPIES = 400
_RUNS = 9
_MICROSOFT = "com.microsoft"

Weights = Mapping[str, npt.NDArray[Any]]
# What decides how long a product takes: format, shape (out, in) and block.
ProductKind = tuple[str, tuple[int, int], int]


def kind_of(step: Step) -> ProductKind:
    """What a plan's step is multiplied as."""
    if step.result in DENSE:
        return ("fp32", step.shape, 0)
    return (step.result, step.shape, int(step.options.get("blocksize", step.options.get("block", BLOCK))))


def nanoseconds(kind: ProductKind) -> int:
    """The time of one product (1, in) x (in, out) of this kind: the shortest of several runs."""
    import onnxruntime as ort

    size = sum(array.nbytes for array in _weights(kind).values())
    copies = max(1, min(_COPIES, _BYTES // size))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = available_cores()
    # Else equal weights become one.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph(kind, copies), options, providers=["CPUExecutionProvider"])
    x = {"x": np.random.default_rng(0).standard_normal((1, kind[1][1])).astype(np.float32)}
    session.run(None, x)
    times = []
    for _ in range(_RUNS):
        begun = time.perf_counter_ns()
        session.run(None, x)
        times.append(time.perf_counter_ns() - begun)
    return max(1, min(times) // copies)


def _weights(kind: ProductKind) -> Weights:
    """Initializers of one product, in the order of the operator's inputs; what they hold doesn't matter."""
    name, (out, inside), block = kind
    if name == "fp32":
        return {"weight": np.full((inside, out), 0.01, np.float32)}
    if name in ("nf4", "fp4"):
        blocks = -(-out * inside // block)
        return {
            "packed": np.full(-(-out * inside // 2), 0x37, np.uint8),
            "absmax": np.full(blocks, 0.01, np.float32),
        }
    bits, blocks = int(name.removeprefix("int")), -(-inside // block)
    found: dict[str, npt.NDArray[Any]] = {
        "codes": np.full((out, blocks, block * bits // 8), 0x37, np.uint8),
        "scales": np.full((out, blocks), 0.01, np.float32),
    }
    if bits == 4:
        found["zeros"] = np.full((out, -(-blocks // 2)), 0x88, np.uint8)
    return found


def graph(kind: ProductKind, copies: int) -> bytes:
    """An ONNX model of `copies` products of x (1, in), each with weights of its own."""
    from onnx import TensorProto, helper, numpy_helper

    weights, (name, (out, inside), block) = _weights(kind), kind
    nodes, outputs, initializers = [], [], []
    for number in range(copies):
        names = [f"{part}{number}" for part in weights]
        initializers += [
            numpy_helper.from_array(array, one) for array, one in zip(weights.values(), names, strict=True)
        ]
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [1, out]))
        operator, attributes = _operator(name, out, inside, block)
        nodes.append(helper.make_node(operator, ["x", *names], [f"y{number}"], **attributes))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inside])
    made = helper.make_graph(nodes, "products", [x], outputs, initializers)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(made, opset_imports=versions, ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def _operator(name: str, out: int, inside: int, block: int) -> tuple[str, dict[str, Any]]:
    """The operator that an export multiplies with, and its attributes."""
    if name == "fp32":
        return "MatMul", {}
    facts = {"domain": _MICROSOFT, "K": inside, "N": out, "block_size": block}
    if name in ("nf4", "fp4"):
        return "MatMulBnb4", facts | {"quant_type": int(name == "nf4")}
    return "MatMulNBits", facts | {"bits": int(name.removeprefix("int")), "accuracy_level": 4}
