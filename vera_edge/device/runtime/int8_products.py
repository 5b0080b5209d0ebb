"""Products of uint8 and int8, and the processors that add them in 16 bits.

x86 without VNNI multiplies uint8 by int8 with `vpmaddubsw`, which adds the products of two inputs that stand
beside each other in 16 bits and clips what doesn't fit. 255 * (w0 + w1) fits as long as two weights of one
sign add up to 128 at most: a weight that keeps to that gives the same sums on every processor, any other may
not. With `session.x64quantprecision` ONNX Runtime multiplies such a weight as uint8, which is exact and
slower; before 1.30 it leaves weights without a zero point as they are, or ends the process. `Graph` sets it
where a bundle needs it, other programs don't.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from vera_edge.bundle.manifest import VNNI, Manifest
from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.graph import release
from vera_edge.device.runtime.onnx_file import INT8, Initializer, Node, OnnxFile
from vera_edge.errors import BundleError, BundleWarning

_EXACT_SINCE = (1, 30)  # of ONNX Runtime
PAIR = 128  # the most that two weights of one sign may add up to: 255 * 128 is the last that int16 holds
_INTEGER_OPS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
# Float products that ONNX Runtime makes integer ones, where DequantizeLinear gives both of their inputs.
_FLOAT_OPS = frozenset({"Conv", "Gemm", "MatMul"})
_IN_ROWS = frozenset(
    {"DynamicQuantizeMatMul", "MatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul"}
)


@dataclass(frozen=True)
class Products:
    """The int8 weights of a graph that meet integer activations, by name, and those that can overflow."""

    weights: tuple[str, ...]
    overflowing: tuple[str, ...]


def of_graph(path: Path) -> Products:
    """The int8 products of the ONNX graph in `path`.

    A weight whose file isn't there counts as one that can overflow. Raises BundleError when the file isn't an
    ONNX graph.
    """
    graph = OnnxFile.read(path)
    in_rows: dict[str, bool] = {}
    for name, rows in _weights(graph):
        in_rows[name] = in_rows.get(name, True) and rows
    overflowing = []
    for name, rows in in_rows.items():
        codes = graph.int8(name)
        if codes is None or (pairs_overflow(codes) if rows else _any_two_overflow(codes)):
            overflowing.append(name)
    return Products(tuple(in_rows), tuple(overflowing))


def pairs_overflow(codes: npt.NDArray[np.int8]) -> bool:
    """Whether two neighbours along the inputs of `codes` (..., in, out) can overflow beside uint8 inputs."""
    wide = codes.astype(np.int16)
    return any(
        bool((part[..., :-1, :] + part[..., 1:, :] > PAIR).any())
        for part in (np.maximum(wide, 0), np.maximum(-wide, 0))
    )


def _any_two_overflow(codes: npt.NDArray[np.int8]) -> bool:
    """The same whichever of the codes stand beside each other."""
    wide = codes.astype(np.int16).reshape(-1)
    return any(int(np.sort(part)[-2:].sum()) > PAIR for part in (wide, -wide))


def _weights(graph: OnnxFile) -> Iterator[tuple[str, bool]]:
    """Each int8 weight of an integer product, and whether its second to last axis is the input's."""
    from_node = {name: node for node in graph.nodes for name in node.outputs}

    def weight(name: str) -> bool:
        one: Initializer | None = graph.initializers.get(name)
        return one is not None and one.dtype == INT8 and len(one.shape) > 1

    def dequantized(name: str) -> tuple[str, bool] | None:
        """What is dequantized to give `name`, and whether that is all that happens to it."""
        node: Node | None = from_node.get(name)
        if node is not None and node.op == "Transpose":
            found = dequantized(node.inputs[0])
            return None if found is None else (found[0], False)
        return (node.inputs[0], True) if node is not None and node.op == "DequantizeLinear" else None

    for node in graph.nodes:
        if node.op in _INTEGER_OPS:
            yield from ((name, node.op in _IN_ROWS) for name in node.inputs if weight(name))
        elif node.op in _FLOAT_OPS:
            sources = [dequantized(name) for name in node.inputs[:2]]
            if None not in sources:
                found = [source for source in sources if source is not None and weight(source[0])]
                yield from ((name, plain and node.op in _IN_ROWS) for name, plain in found)


@cache
def processor_clips() -> bool:
    """Whether ONNX Runtime's kernels on this processor clip such sums, by a product that shows it.

    One row and several, which have kernels of their own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    width, out = 32, 16
    graph = _probe(width, out)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    for rows in (1, 8):
        (sums,) = session.run(None, {"x": np.full((rows, width), 255, np.uint8)})
        if (sums != 255 * 127 * width).any():
            return True
    return False


def needs(path: Path) -> tuple[str, ...]:
    """What the ONNX graph in `path` asks of an x86 processor, as the manifest lists it."""
    return (VNNI,) if of_graph(path).overflowing else ()


def must_be_exact(manifest: Manifest) -> bool:
    """Whether ONNX Runtime is to be told not to let this bundle's products overflow.

    Also where the manifest doesn't tell what they are. Warns as `warn` does. Raises BundleError when this
    ONNX Runtime can't run the bundle rightly on this processor.
    """
    if not manifest.needs_vnni:
        return manifest.cpu is None
    if not processor_clips():
        return False
    if release(onnxruntime.__version__) < _EXACT_SINCE:
        raise BundleError(
            f"{manifest.folder} has int8 products that overflow on this processor, which has no VNNI, with "
            f"onnxruntime {onnxruntime.__version__}; export it again, or update onnxruntime to 1.30 or newer"
        )
    warn(manifest)
    return True


def warn(manifest: Manifest) -> None:
    """Warn when this bundle, by what its manifest says, is wrong in other programs on this processor."""
    if manifest.needs_vnni and processor_clips():
        warnings.warn(
            f"{manifest.folder} has int8 products that overflow on this processor, which has no VNNI: "
            "vera-edge runs them exactly and slower, other programs give wrong values; export it again",
            BundleWarning,
            stacklevel=2,
        )


def _probe(width: int, out: int) -> bytes:
    """An ONNX model: x (rows, width) of uint8 times int8 weights that are all 127."""
    graph = message.field(1, message.node("MatMulInteger", ["x", "w"], "y")) + message.field(2, "probe")
    graph += message.field(5, message.constant("w", np.full((width, out), 127, np.int8)))
    graph += message.field(11, message.port("x", 2, (None, width)))
    return message.model(graph + message.field(12, message.port("y", 6, (None, out))), {"": 13})
