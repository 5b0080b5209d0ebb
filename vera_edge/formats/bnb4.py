"""bitsandbytes' 4-bit formats, NF4 and FP4, read and written bit for bit, in numpy.

Values are packed two to a byte in row-major order; each run of `blocksize` values shares one absmax, which
may be double-quantized (see nested.py). Shape and sizes stand in a JSON text that is kept as a uint8 tensor,
`<module>.weight.quant_state.bitsandbytes__nf4`. Source: bitsandbytes' `functional.QuantState`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.arrays import Bytes, Float32
from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.formats import codes4, compiled
from vera_edge.formats.codes4 import LEVELS, block_codes, levels_of, nearest_codes, pack
from vera_edge.formats.nested import BLOCKSIZE as NESTED_BLOCKSIZE
from vera_edge.formats.nested import Nested, quantize_absmax
from vera_edge.formats.weight import CHUNK_VALUES, Layout, StoredLinear, Weight, add_values
from vera_edge.storage import json_text
from vera_edge.storage.tensors import DTYPES, FLOATS, RawTensor, TensorFolder

STATE = ".weight.quant_state.bitsandbytes__"
STORAGES = {"U8": "uint8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MAX_STATE = 1 << 16
_OFFSET_CHARS = 24  # no float32 takes more in JSON: sign, 17 digits, point, exponent
_DEFAULTS = {"blocksize": 64, "double_quant": False, "storage": "U8", "dtype": "float32"}


@dataclass(frozen=True)
class Bnb4Weight:
    """An NF4 or FP4 weight in memory.

    `packed`: uint8, flat, two codes a byte. `absmax`: float32 (blocks,), de-nested. `nested`: its
    double-quantized form, where it has one. `storage`: the safetensors dtype the bytes are stored under.
    """

    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    packed: Bytes
    absmax: Float32
    nested: Nested | None = None
    storage: str = "U8"
    dtype: str = "float32"

    def rows(self, start: int, stop: int) -> Float32:
        """Rows as float32: level times absmax, one rounding, as bitsandbytes' own kernels have it."""
        whole = self.whole_blocks(start, stop)
        if whole is not None:
            rows = np.empty((stop - start, self.shape[1]), np.float32)
            put = compiled.four_bits(self.blocksize).put
            put(*whole, codes4.tables(self.quant_type).pairs, rows.reshape(-1))
            return rows
        begin, end = start * self.shape[1], stop * self.shape[1]
        # Blocks run over row ends: begin at the block that holds the first value.
        first = begin // self.blocksize
        aligned = first * self.blocksize
        values = levels_of(self.packed[aligned // 2 : (end + 1) // 2], self.quant_type)[: end - aligned]
        full = values.size // self.blocksize
        blocks = values[: full * self.blocksize].reshape(full, self.blocksize)
        blocks *= self.absmax[first : first + full, None]
        values[full * self.blocksize :] *= self.absmax[first + full : first + full + 1]
        return values[begin - aligned :].reshape(stop - start, self.shape[1])

    def add_to(self, rows: Float32, start: int) -> bool:
        """See `weight.add_rows`."""
        blocks = self.whole_blocks(start, start + len(rows))
        if blocks is None or not compiled.takes(rows):
            return add_values(rows, self.rows(start, start + len(rows)))
        add = compiled.four_bits(self.blocksize).add
        return bool(add(*blocks, codes4.tables(self.quant_type).pairs, rows.reshape(-1)) < compiled.INFINITE)

    def whole_blocks(self, start: int, stop: int) -> tuple[Bytes, Float32] | None:
        """The codes and absmax of rows, for compiled loops: None where these rows aren't for them."""
        begin, end = start * self.shape[1], stop * self.shape[1]
        packed = self.packed[begin // 2 : end // 2]
        absmax = self.absmax[begin // self.blocksize : end // self.blocksize]
        whole = begin % self.blocksize == 0 and end % self.blocksize == 0
        return (packed, absmax) if whole and compiled.takes(packed, absmax) else None

    def tensors(self) -> Mapping[str, RawTensor]:
        """What to store, by suffix, as bitsandbytes lays it out."""
        words = self.packed.size // DTYPES[self.storage][0]
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        found = {
            ".weight": RawTensor(self.storage, (words, 1), self.packed),
            ".weight.quant_map": RawTensor.of(LEVELS[self.quant_type]),
        }
        if self.nested is None:
            found[".weight.absmax"] = RawTensor.of(self.absmax)
        else:
            found[".weight.absmax"] = RawTensor.of(self.nested.codes)
            found[".weight.nested_absmax"] = RawTensor.of(self.nested.scales)
            found[".weight.nested_quant_map"] = RawTensor.of(self.nested.code_book)
            state |= {"nested_blocksize": self.nested.blocksize, "nested_dtype": "float32"}
            state["nested_offset"] = float(self.nested.offset)
        text = json.dumps(state).encode().ljust(_state_size(self.shape, state))
        found[STATE + self.quant_type] = RawTensor.of(np.frombuffer(text, np.uint8))
        return found


def _state_size(shape: tuple[int, int], state: Mapping[str, Any]) -> int:
    """Bytes of the JSON text, with room for the longest offset, so that it's known before the offset is."""
    text = json.dumps({**state, "shape": list(shape), "nested_offset": 0})
    return (
        len(text) + _OFFSET_CHARS if "nested_blocksize" in state else len(text) - len(', "nested_offset": 0')
    )


@dataclass(frozen=True)
class Bnb4:
    """NF4 or FP4."""

    name: str

    def find(self, tensors: TensorFolder, config: Mapping[str, Any]) -> Mapping[str, StoredLinear]:
        suffix = STATE + self.name
        modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
        return {module: self._stored(tensors, module) for module in modules}

    def _roles(self, module: str, nested: bool) -> dict[str, str]:
        weight = f"{module}.weight"
        roles = {"weight": weight, "quant_map": f"{weight}.quant_map", "absmax": f"{weight}.absmax"}
        roles["quant_state"] = f"{module}{STATE}{self.name}"
        if nested:
            roles |= {role: f"{weight}.{role}" for role in ("nested_absmax", "nested_quant_map")}
        return roles

    def _stored(self, tensors: TensorFolder, module: str) -> StoredLinear:
        state = _read_state(tensors, module, self.name)
        weight, nested = f"{module}.weight", "nested_blocksize" in state
        roles = self._roles(module, nested)
        for role, name in roles.items():
            if name not in tensors:
                raise CheckpointError(f"{module} is {self.name} but its tensor {name} ({role}) is missing")
        out, inside = state["shape"]
        blocks = -(-out * inside // state["blocksize"])
        _expect(tensors, roles["weight"], frozenset(STORAGES), nbytes=-(-out * inside // 2))
        _expect(tensors, roles["quant_map"], FLOATS, count=16)
        _expect(tensors, roles["absmax"], frozenset({"U8"}) if nested else FLOATS, count=blocks)
        if nested:
            _expect(tensors, roles["nested_absmax"], FLOATS, count=-(-blocks // state["nested_blocksize"]))
            _expect(tensors, roles["nested_quant_map"], FLOATS, count=256)
        params = {
            "blocksize": state["blocksize"],
            "double_quant": nested,
            "storage": tensors[weight].dtype,
            "dtype": state["dtype"],
            "nested_blocksize": state.get("nested_blocksize"),
        }
        return self.stored(module, (out, inside), params)

    def stored(self, module: str, shape: tuple[int, int], options: Mapping[str, Any]) -> StoredLinear:
        """A linear of this shape (out, in) as it lies in a checkpoint under these options."""
        roles = self._roles(module, options["double_quant"])
        params = {key: options[key] for key in _DEFAULTS}
        if params["double_quant"]:
            params["nested_blocksize"] = options.get("nested_blocksize", NESTED_BLOCKSIZE)
        return StoredLinear(module, *shape, self.name, roles, params)

    def load(self, tensors: TensorFolder, linear: StoredLinear) -> Bnb4Weight:
        roles, params = linear.tensors, linear.params
        levels = tensors.float32(roles["quant_map"]).reshape(-1)
        if not np.allclose(levels, LEVELS[self.name], rtol=0, atol=1e-6):
            raise FormatError(
                f"{roles['quant_map']} isn't bitsandbytes' {self.name} table; no version known wrote it"
            )
        nested = None
        if params["double_quant"]:
            state = _read_state(tensors, linear.module, self.name)
            nested = Nested(
                tensors.read(roles["absmax"]).data,
                tensors.float32(roles["nested_quant_map"]).reshape(-1),
                tensors.float32(roles["nested_absmax"]).reshape(-1),
                params["nested_blocksize"],
                np.float32(state["nested_offset"]),
            )
        absmax = nested.absmax() if nested else tensors.float32(roles["absmax"]).reshape(-1)
        if not np.isfinite(absmax).all():
            raise CheckpointError(
                f"{roles['absmax']} of {tensors[roles['absmax']].file} gives NaN or infinite scales; "
                "the checkpoint is damaged: copy or quantize it again"
            )
        packed = tensors.read(roles["weight"]).data
        kept = (params["storage"], params["dtype"])
        return Bnb4Weight(linear.shape, self.name, params["blocksize"], packed, absmax, nested, *kept)

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        return {key: linear.params[key] for key in _DEFAULTS}

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if unknown := sorted(set(given) - set(_DEFAULTS)):
            raise PlanError(f"{self.name} takes no option {unknown[0]!r}; it takes {', '.join(_DEFAULTS)}")
        options = {**_DEFAULTS, **given}
        if options["storage"] not in tuple(STORAGES) or options["dtype"] not in tuple(STORAGES.values())[1:]:
            raise PlanError(
                f"{self.name} is stored as {', '.join(STORAGES)} and computes in float32, float16 or "
                f"bfloat16, not {options['storage']!r} and {options['dtype']!r}"
            )
        if type(options["double_quant"]) is not bool:
            raise PlanError(f"double_quant of {self.name} is {options['double_quant']!r}, not true or false")
        if type(options["blocksize"]) is not int or options["blocksize"] not in BLOCKSIZES:
            raise PlanError(
                f"bitsandbytes reads no 4-bit block size {options['blocksize']}; choose one of "
                f"{', '.join(map(str, BLOCKSIZES))}"
            )
        return options

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        count, width = shape[0] * shape[1], DTYPES[options["storage"]][0]
        nbytes, blocks = -(-count // 2), -(-count // options["blocksize"])
        if nbytes % width:
            raise PlanError(
                f"a {self.name} weight of shape {list(shape)} doesn't fill whole {options['storage']} words; "
                "store it as U8"
            )
        state = {"quant_type": self.name, "blocksize": options["blocksize"], "dtype": options["dtype"]}
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            ".weight": (options["storage"], (nbytes // width, 1)),
            ".weight.quant_map": ("F32", (16,)),
            ".weight.absmax": ("U8" if options["double_quant"] else "F32", (blocks,)),
        }
        if options["double_quant"]:
            found[".weight.nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCKSIZE),))
            found[".weight.nested_quant_map"] = ("F32", (256,))
            state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        found[STATE + self.name] = ("U8", (_state_size(shape, state),))
        return found

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> Bnb4Weight:
        rounded = self.rounder((weight.shape[0], weight.shape[1]), options)
        rounded.add(weight)
        return rounded.weight()

    def rounder(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Bnb4Rounder:
        return Bnb4Rounder(self.name, shape, options)

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": options["double_quant"],
            "bnb_4bit_quant_storage": STORAGES[options["storage"]],
        }


class Bnb4Rounder:
    """Rounds a weight piece by piece; see `formats.Rounder`."""

    def __init__(self, quant_type: str, shape: tuple[int, int], options: Mapping[str, Any]) -> None:
        count, self._blocksize = shape[0] * shape[1], int(options["blocksize"])
        self.multiple = self._blocksize // math.gcd(self._blocksize, shape[1])
        self._shape, self._quant_type, self._options = shape, quant_type, options
        self._absmax = np.empty(-(-count // self._blocksize), np.float32)
        self._packed = np.empty(-(-count // 2), np.uint8)
        self._done = 0

    def add(self, rows: Float32) -> None:
        values = np.ascontiguousarray(rows, np.float32).reshape(-1)
        values = values[self._add_whole(values) :]
        step = max(1, CHUNK_VALUES // self._blocksize) * self._blocksize
        for start in range(0, values.size, step):
            codes, absmax = block_codes(values[start : start + step], self._blocksize, self._quant_type)
            if codes.size % 2:  # only at the very end: blocks are even
                codes = np.append(codes, nearest_codes(np.zeros(1, np.float32), self._quant_type))
            block, byte = self._done // self._blocksize, self._done // 2
            self._absmax[block : block + absmax.size] = absmax
            self._packed[byte : byte + codes.size // 2] = pack(codes)
            self._done += codes.size

    def add_sum(self, base: Weight, start: int, rows: Float32) -> bool | None:
        """See `weight.round_sum`."""
        if not isinstance(base, Bnb4Weight) or base.blocksize != self._blocksize:
            return None
        blocks = base.whole_blocks(start, start + len(rows))
        if blocks is None or not compiled.takes(rows):
            return None
        pairs, tables = codes4.tables(base.quant_type).pairs, codes4.tables(self._quant_type)
        block, byte, count = self._done // self._blocksize, self._done // 2, blocks[1].size
        absmax, packed = self._absmax[block : block + count], self._packed[byte : byte + rows.size // 2]
        merge = compiled.four_bits(self._blocksize).merge
        largest = merge(*blocks, pairs, rows.reshape(-1), tables.bounds, tables.labels, absmax, packed)
        self._done += rows.size
        return bool(largest < compiled.INFINITE)

    def _add_whole(self, values: Float32) -> int:
        """Round whole blocks by compiled loops, where they are in use; how many of the values that was."""
        count = values.size // self._blocksize if compiled.takes(values) else 0
        whole, block, byte = count * self._blocksize, self._done // self._blocksize, self._done // 2
        if count:
            tables = codes4.tables(self._quant_type)
            absmax, packed = self._absmax[block : block + count], self._packed[byte : byte + whole // 2]
            nearest = compiled.four_bits(self._blocksize).nearest
            nearest(values[:whole], tables.bounds, tables.labels, absmax, packed)
            self._done += whole
        return whole

    def weight(self) -> Bnb4Weight:
        nested = quantize_absmax(self._absmax) if self._options["double_quant"] else None
        kept = (self._options["storage"], self._options["dtype"])
        absmax = nested.absmax() if nested else self._absmax
        return Bnb4Weight(self._shape, self._quant_type, self._blocksize, self._packed, absmax, nested, *kept)


def _expect(
    tensors: TensorFolder,
    name: str,
    dtypes: frozenset[str],
    count: int | None = None,
    nbytes: int | None = None,
) -> None:
    """Hold a tensor's header against what the quant_state says."""
    info = tensors[name]
    if info.dtype not in dtypes:
        wanted = "/".join(sorted(dtypes))
        raise CheckpointError(f"{name} in {info.file} has dtype {info.dtype}, expected {wanted}")
    for found, wanted_size, unit in (
        (math.prod(info.shape), count, "values"),
        (info.nbytes, nbytes, "bytes"),
    ):
        if wanted_size is not None and found != wanted_size:
            raise CheckpointError(
                f"{name} in {info.file} holds {found} {unit}, its quant_state asks for {wanted_size}"
            )


def _read_state(tensors: TensorFolder, module: str, quant_type: str) -> dict[str, Any]:
    """The quant_state of one linear, every field checked."""
    name = f"{module}{STATE}{quant_type}"
    info = tensors[name]
    state: Any = None
    if info.nbytes <= _MAX_STATE:
        with suppress(CheckpointError):
            text = tensors.read(name).data.tobytes()
            state = json_text.parse_json(text, name, CheckpointError, json_text.SHORT)
    if not isinstance(state, dict):
        raise CheckpointError(f"{name} in {info.file} isn't the JSON object bitsandbytes writes")
    if not (_sound_state(state, quant_type) and _sound_nesting(state)):
        raise CheckpointError(f"{name} in {info.file} describes no {quant_type} weight: {str(state)[:200]}")
    return state


def _sound_state(state: Mapping[str, Any], quant_type: str) -> bool:
    shape, blocksize = state.get("shape"), state.get("blocksize")
    return (
        state.get("quant_type") == quant_type
        and _natural(blocksize)
        and not state["blocksize"] % 2
        and isinstance(shape, list)
        and len(shape) == 2
        and all(_natural(size) for size in shape)
        and state.get("dtype") in ("float32", "float16", "bfloat16")
    )


def _sound_nesting(state: Mapping[str, Any]) -> bool:
    offset = state.get("nested_offset")
    if "nested_blocksize" not in state:
        return offset is None
    return _natural(state["nested_blocksize"]) and isinstance(offset, int | float) and math.isfinite(offset)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def parts(tensors: TensorFolder, linear: StoredLinear) -> Bnb4Weight:
    """The raw parts of an NF4 or FP4 linear (packed bytes, exact float32 absmax, block size, quant type)."""
    return Bnb4(linear.format).load(tensors, linear)
