"""A graph of `MatMulBnb4` rewritten in memory for int8 blocks, which a CPU multiplies much faster.

ONNX Runtime unpacks all of an NF4 weight whenever `MatMulBnb4` runs. `MatMulNBits` reads int8 blocks as they
are, and rounds what it multiplies them with to int8 too, by blocks of 32: x becomes x1. That rounding costs
more than the weights'. So "expanded" multiplies x - x1 besides, as further rows of the same product, which
reads the weights once for both:

    s = max |x| / 127,  x1 = s * round(x / s),  y = W x1 + W (x - x1)

The first row is given as x, of which ONNX Runtime itself makes x1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vera_edge.arrays import Array
from vera_edge.device.runtime import onnx_message as message
from vera_edge.device.runtime.four_bit import BLOCK, Each, can_expand, expand, expanded_bytes
from vera_edge.device.runtime.onnx_file import OnnxFile, attributes, fields, opset, spans, text
from vera_edge.errors import BundleError, PlanError

FourBit = Literal["expanded", "int8", "kept"]
_TYPES = ("fp4", "nf4")  # as MatMulBnb4's quant_type counts them
# The least `max_kl` at which weights are expanded: SmolLM2 loses 0.0004 nats in the mean, 0.001 on a prompt.
LOSS = 0.005
_OPSET = 18  # since when ReduceMax takes its axes as an input
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5  # field numbers of ModelProto and GraphProto


@dataclass(frozen=True)
class FourBitProduct:
    """A `MatMulBnb4`: its names, the shape (out, in) of its weight and how that is stored."""

    name: str
    x: str
    packed: str
    absmax: str
    y: str
    shape: tuple[int, int]
    blocksize: int
    quant_type: str


def check(four_bit: str) -> None:
    """Raise PlanError for what is none of FourBit."""
    if four_bit not in get_args(FourBit):
        raise PlanError(
            f"4-bit weights can't run as {four_bit!r}; choose from {', '.join(get_args(FourBit))}"
        )


def products(path: Path) -> list[FourBitProduct]:
    """The products of the graph in `path` that can be rewritten. Raises BundleError when it isn't a graph."""
    whole = _whole(path)
    if b"MatMulBnb4" not in bytes(whole):
        return []
    try:
        if opset(whole) < _OPSET:
            return []
        graph = next(value for number, value in fields(whole) if number == _GRAPH)
        found = (_product(value) for number, value in fields(graph) if number == _NODE)
        return [one for one in found if one is not None and can_expand(one.shape, one.blocksize)]
    except (ValueError, IndexError, TypeError, KeyError, StopIteration) as cause:
        raise BundleError(f"{path} isn't an ONNX graph ({cause}); export the bundle again") from None


def added_bytes(found: Sequence[FourBitProduct]) -> int:
    """The memory that these products take as int8 blocks: the blocks, and ONNX Runtime's own copy of them."""
    return 2 * sum(expanded_bytes(shape) for shape in {one.packed: one.shape for one in found}.values())


@dataclass
class Rewriting:
    """A graph under change. `held`: the initializers that `Graph` hands over, by name."""

    path: Path
    found: Sequence[FourBitProduct]
    in_two_parts: bool
    threads: int = 1
    held: dict[str, Array] = field(default_factory=dict)
    _constants: dict[str, bytes] = field(default_factory=dict)
    _parted: dict[str, str] = field(default_factory=dict)

    def model(self) -> bytes:
        """The file's bytes with every product rewritten. Raises BundleError when a weight isn't sound."""
        self._expand()
        made = bytearray()
        for number, value, whole in spans(_whole(self.path)):
            made += message.field(_GRAPH, self._graph(value)) if number == _GRAPH else bytes(whole)
        return bytes(made)

    def _expand(self) -> None:
        """Fill `held`, after which the file's own weights are no longer needed."""
        file = OnnxFile.read(self.path)
        with ThreadPoolExecutor(self.threads) as pool:
            self._expand_by(file, pool.map if self.threads > 1 else map)

    def _expand_by(self, file: OnnxFile, each: Each) -> None:
        for one in self.found:
            if one.packed in self.held:
                continue
            packed, absmax = file.values(one.packed, np.uint8), file.values(one.absmax, np.float32)
            size = one.shape[0] * one.shape[1]
            if (
                packed is None
                or absmax is None
                or (packed.size * 2, absmax.size * one.blocksize) != (size,) * 2
            ):
                raise BundleError(f"{self.path} holds no sound {one.packed}; copy the bundle again")
            arrays = expand(packed, absmax, one.quant_type, one.shape, one.blocksize, each)
            self.held |= zip(_names(one), arrays, strict=True)

    def _graph(self, graph: Any) -> bytes:
        gone = {name for one in self.found for name in (one.packed, one.absmax)}
        by_output, made = {one.y: one for one in self.found}, bytearray()
        for number, value, whole in spans(graph):
            if number == _NODE and (one := _product(value)) is not None and one.y in by_output:
                for node in self._nodes(one):
                    made += message.field(_NODE, node)
            elif number != _INITIALIZER or _name(value) not in gone:
                made += whole
        tensors = [message.held(name, array) for name, array in self.held.items()]
        return bytes(made) + b"".join(
            message.field(_INITIALIZER, one) for one in (*tensors, *self._constants.values())
        )

    def _nodes(self, one: FourBitProduct) -> Iterator[bytes]:
        x, y = one.x, one.y
        if self.in_two_parts:
            if x not in self._parted:
                self._parted[x] = f"{x}/parts"
                yield from self._parts(x, one.shape[1])
            x, y = self._parted[x], f"{y}/parts"
        out, inside = one.shape
        sizes = {"K": inside, "N": out, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        yield message.node("MatMulNBits", [x, *_names(one)], y, sizes, one.name, message.MICROSOFT)
        if self.in_two_parts:
            yield message.node("ReduceSum", [y, self._constant("first", [0])], one.y, {"keepdims": 0})

    def _parts(self, x: str, width: int) -> Iterator[bytes]:
        """x (..., width) and what its rounding leaves, (2, ..., width)."""
        ones = self._constant("usual", np.float32(1 / 127))
        least = self._constant("least", np.float32(1e-30))  # a block of zeros has a scale too
        cut = self._constant(f"cut{width}", [-1, width // BLOCK, BLOCK])
        for op, inputs, output, settings in (
            ("Reshape", (x, cut), "blocks", {}),
            ("Abs", (f"{x}/blocks",), "sizes", {}),
            ("ReduceMax", (f"{x}/sizes", self._constant("last", [-1])), "largest", {"keepdims": 1}),
            ("Mul", (f"{x}/largest", ones), "scale", {}),
            ("Max", (f"{x}/scale", least), "divisor", {}),
            ("Div", (f"{x}/blocks", f"{x}/divisor"), "steps", {}),
            ("Round", (f"{x}/steps",), "rounded", {}),
            ("Mul", (f"{x}/rounded", f"{x}/divisor"), "first", {}),
            ("Sub", (f"{x}/blocks", f"{x}/first"), "second", {}),
            ("Concat", (f"{x}/blocks", f"{x}/second"), "both", {"axis": 0}),
            ("Shape", (x,), "shape", {}),
            ("Concat", (self._constant("two", [2]), f"{x}/shape"), "shapes", {"axis": 0}),
            ("Reshape", (f"{x}/both", f"{x}/shapes"), "parts", {}),
        ):
            yield message.node(op, inputs, f"{x}/{output}", settings)

    def _constant(self, name: str, value: Any) -> str:
        """A constant of the graph, floats or int64: its name."""
        array = np.asarray(value) if isinstance(value, np.generic) else np.array(value, np.int64)
        name = f"four_bit/{name}"
        self._constants[name] = message.constant(name, array)
        return name


@dataclass(frozen=True)
class Rewritten:
    """A graph with its products rewritten: its bytes, the initializers to hand over, and what it took."""

    model: bytes
    held: Mapping[str, Array]
    products: int
    seconds: float

    @property
    def told(self) -> str:
        """What it costs, for a person."""
        size = sum(array.nbytes for array in self.held.values()) / 1e6
        return (
            f"{self.products} 4-bit products run in int8 blocks, made in {self.seconds:.1f} s; they take "
            f"{size:.1f} MB of memory, and as much again in ONNX Runtime (--four-bit kept: run as they are)"
        )


def rewrite(path: Path, found: Sequence[FourBitProduct], four_bit: FourBit, threads: int = 1) -> Rewritten:
    """The graph in `path` with these products rewritten, by so many threads, which change no byte.

    Raises BundleError when a weight isn't sound.
    """
    began = time.monotonic()
    made = Rewriting(path, found, four_bit == "expanded", threads)
    return Rewritten(made.model(), made.held, len(found), time.monotonic() - began)


def _names(one: FourBitProduct) -> tuple[str, str]:
    return f"{one.packed}/codes", f"{one.packed}/scales"


def _whole(path: Path) -> Any:
    return memoryview(np.memmap(path, np.uint8, "r").data)


def _name(tensor: Any) -> str:
    return next((text(value) for number, value in fields(tensor) if number == 8), "")


def _product(node: Any) -> FourBitProduct | None:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""]}  # input, output, name, op_type
    for number, value in fields(node):
        if number in texts:
            texts[number].append(text(value))
    if texts[4][-1] != "MatMulBnb4" or len(texts[1]) != 3:
        return None
    sizes = attributes(node)
    shape, kind = (sizes["N"], sizes["K"]), sizes["quant_type"]
    x, packed, absmax = texts[1]
    names = (texts[3][-1], x, packed, absmax, texts[2][0])
    return FourBitProduct(*names, shape=shape, blocksize=sizes["block_size"], quant_type=_TYPES[kind])
