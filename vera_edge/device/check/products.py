"""How long one token's product takes in each format: in ONNX Runtime, on this device.

Generating text multiplies one row with every weight of the model once, so weights come from memory and not
from a cache. Each kind of product is therefore timed over many weights of its shape, one after the other.
`vera-edge plan --device-times` reads what is measured here, so that a plan can be made for another machine.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.bundle.manifest import Manifest
from vera_edge.device.runtime import onnx_message as message
from vera_edge.errors import DataError
from vera_edge.progress import Progress, silent

# More than the last level of most caches, and as much as a small model's layers of one shape.
_BYTES = 64 << 20
_COPIES = 400
_RUNS = 9
_WIDEST = 256  # the largest block that MatMulNBits takes
DEFAULT_BLOCKS: Mapping[str, int] = {"int4": 32, "int8": 32, "nf4": 64, "fp4": 64, "fp32": 0}
FORMATS = tuple(DEFAULT_BLOCKS)

Weights = Mapping[str, npt.NDArray[Any]]
# What decides how long a product takes: format, shape (out, in) and block.
ProductKind = tuple[str, tuple[int, int], int]


@dataclass(frozen=True)
class ProductTime:
    """nanoseconds of one product (1, inside) x (inside, out), weights of `format` in blocks of `block`."""

    format: str
    out: int
    inside: int
    block: int
    threads: int
    nanoseconds: int


def parse_formats(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """(format, block) of names like "int4", "int8:128" or "fp32". Raises DataError for any other."""
    found = []
    for name in names:
        kind, _, written = name.partition(":")
        usual = DEFAULT_BLOCKS.get(kind)
        block = usual if not written else int(written) if written.isascii() and written.isdigit() else 0
        whole = block is not None and 16 <= block <= _WIDEST and block & (block - 1) == 0
        if usual is None or block is None or (written and usual != 32) or not (whole or not usual):
            raise DataError(
                f"products can't be timed as {name!r}; choose from {', '.join(FORMATS)}, integers also with "
                f"a block that is a power of 2 from 16 to {_WIDEST}, like int8:128"
            )
        found.append((kind, block))
    if len(found) != len(set(found)):
        raise DataError(f"{', '.join(names)} has a format more than once")
    return tuple(found)


def shapes_of(manifest: Manifest) -> tuple[tuple[int, int], ...]:
    """The shapes (out, in) of the bundle's linears, each once. Raises DataError when it names none."""
    steps: Any = (manifest.plan or {}).get("steps")
    found = [step.get("shape") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    whole = {
        (one[0], one[1])
        for one in found
        if isinstance(one, list) and len(one) == 2 and all(type(size) is int and size > 0 for size in one)
    }
    if not whole:
        raise DataError("this bundle doesn't say the shapes of its layers, so their products can't be timed")
    return tuple(sorted(whole))


def measure(
    shapes: Collection[tuple[int, int]],
    formats: Sequence[tuple[str, int]],
    threads: Sequence[int],
    progress: Progress = silent,
) -> tuple[ProductTime, ...]:
    """Every shape in every (format, block), at each number of threads."""
    found = []
    wanted = [(count, kind, block, shape) for count in threads for kind, block in formats for shape in shapes]
    for done, (count, kind, block, shape) in enumerate(wanted):
        progress("timing products", done, len(wanted))
        spent = nanoseconds((kind, shape, block), count)
        found.append(ProductTime(kind, *shape, block, count, spent))
    return tuple(found)


def nanoseconds(kind: ProductKind, threads: int) -> int:
    """The time of one product (1, in) x (in, out) of this kind: the shortest of several runs."""
    import onnxruntime as ort

    size = sum(array.nbytes for array in _weights(kind).values())
    copies = max(1, min(_COPIES, _BYTES // size))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
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


def graph(kind: ProductKind, copies: int) -> bytes:
    """An ONNX model of `copies` products of x (1, in), each with weights of its own."""
    weights, (name, (out, inside), block) = _weights(kind), kind
    operator, domain, attributes = _operator(name, out, inside, block)
    parts = []
    for number in range(copies):
        names = [f"{part}{number}" for part in weights]
        parts += [
            message.field(5, message.constant(one, array))
            for array, one in zip(weights.values(), names, strict=True)
        ]
        y = f"y{number}"
        parts.append(message.field(1, message.node(operator, ["x", *names], y, attributes, domain=domain)))
        parts.append(message.field(12, message.port(y, message.FLOAT, (1, out))))
    parts.append(message.field(11, message.port("x", message.FLOAT, (1, inside))))
    parts.append(message.field(2, "products"))
    return message.model(b"".join(parts), {"": 17, message.MICROSOFT: 1})


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


def _operator(name: str, out: int, inside: int, block: int) -> tuple[str, str, dict[str, int]]:
    """The operator that an export multiplies with, its domain and its attributes."""
    if name == "fp32":
        return "MatMul", "", {}
    sizes = {"K": inside, "N": out, "block_size": block}
    if name in ("nf4", "fp4"):
        return "MatMulBnb4", message.MICROSOFT, sizes | {"quant_type": int(name == "nf4")}
    return (
        "MatMulNBits",
        message.MICROSOFT,
        sizes | {"bits": int(name.removeprefix("int")), "accuracy_level": 4},
    )
