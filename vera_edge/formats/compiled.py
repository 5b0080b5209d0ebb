"""The loops over weights that numpy takes many passes for, compiled by numba: one pass, the same bits.

They run once `start` was called, in a process where numba is installed; numpy does it everywhere else. Each
function below is plain Python over flat arrays, compiled for the types that its comment names and kept in
numba's cache beside the source, so that only the first process on a machine waits for the compiler. No
sum is reordered and no product fused into a sum: numba allows neither unless it's told to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np

from vera_edge.arrays import Array

Function = Callable[..., Any]
INFINITE = 0x7F800000  # the bits of infinity; of float32 without a sign, only NaN's are larger
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign, which leaves floats in the order of their bits
_TINY, _ONE = np.float32(1e-38), np.float32(1)
_STRIP = 64  # blocks that are looked through at once, while they're in the cache
_PART = 1024  # bfloat16 values, alike
_compiling = Lock()  # what one thread compiles another waits for
_started = False


def start() -> bool:
    """Have the formats use compiled loops from now on; whether they do. It takes some tenths of a second."""
    global _started
    if not _started:
        try:
            import_module("numba")
        except ImportError:  # it isn't there, or not for this numpy
            return False
        _started = True
    return True


def stop() -> None:
    """Have the formats use numpy again."""
    global _started
    _started = False


def takes(*arrays: Array) -> bool:
    """Whether compiled loops are in use, and these arrays lie in memory as they need it."""
    return _started and all(array.flags.c_contiguous and array.flags.aligned for array in arrays)


@dataclass(frozen=True)
class FourBits:
    """The loops for 4-bit blocks of one size, over whole blocks only.

    put(packed, absmax, pairs, rows): level times absmax into `rows`.
    add(packed, absmax, pairs, rows): the same added to `rows`; returns the largest bits without sign.
    nearest(rows, bounds, labels, absmax, packed): the blocks' absmax, and of each value over it the nearest
    level's code, two to a byte.
    merge(packed, absmax, pairs, rows, bounds, labels, absmax, packed): `add`, then `nearest`.

    packed: uint8, a code in each half. pairs: uint64 (256,), a byte's two levels as bits. bounds: float32
    (15,), rising. labels: uint8 (256,), what two ranks among the levels, in a byte, are as two codes.
    """

    put: Function
    add: Function
    nearest: Function
    merge: Function


@cache
def _four_bits(blocksize: int) -> FourBits:
    _parts()
    half = blocksize // 2

    def put(packed: Any, absmax: Any, pairs: Any, rows: Any) -> None:
        held = np.empty(half, np.uint64)
        levels = held.view(np.float32)
        for block in range(absmax.size):
            _levels(packed, block, half, pairs, held)
            target = rows[block * blocksize : block * blocksize + blocksize]
            scale = absmax[block]
            for i in range(blocksize):
                target[i] = levels[i] * scale

    def add(packed: Any, absmax: Any, pairs: Any, rows: Any) -> Any:
        held, largest = np.empty(half, np.uint64), np.int32(0)
        levels = held.view(np.float32)
        for first in range(0, absmax.size, _STRIP):
            last = min(absmax.size, first + _STRIP)
            for block in range(first, last):
                _levels(packed, block, half, pairs, held)
                part = rows[block * blocksize : block * blocksize + blocksize]
                _add_scaled(levels, absmax[block], part, blocksize)
            strip = rows[first * blocksize : last * blocksize]
            largest = max(largest, _largest(strip, strip.size))
        return largest

    def nearest(rows: Any, bounds: Any, labels: Any, absmax: Any, packed: Any) -> None:
        limits, rising = _fifteen(bounds), labels[1] == 1
        both, bits = np.empty(half, np.uint16), absmax.view(np.int32)
        ranks = both.view(np.uint8)
        for block in range(absmax.size):
            part = rows[block * blocksize : block * blocksize + blocksize]
            bits[block] = _largest(part, blocksize)
            _ranks(part, absmax[block], limits, ranks, blocksize)
            _pack(both, rising, labels, packed[block * half : block * half + half], half)

    def merge(
        packed: Any, absmax: Any, pairs: Any, rows: Any, bounds: Any, labels: Any, found: Any, codes: Any
    ) -> Any:
        limits, rising = _fifteen(bounds), labels[1] == 1
        both, bits = np.empty(half, np.uint16), found.view(np.int32)
        ranks = both.view(np.uint8)
        held, largest = np.empty(half, np.uint64), np.int32(0)
        levels = held.view(np.float32)
        for block in range(absmax.size):
            part = rows[block * blocksize : block * blocksize + blocksize]
            _levels(packed, block, half, pairs, held)
            _add_scaled(levels, absmax[block], part, blocksize)
            bits[block] = _largest(part, blocksize)
            largest = max(largest, bits[block])
            _ranks(part, found[block], limits, ranks, blocksize)
            _pack(both, rising, labels, codes[block * half : block * half + half], half)
        return largest

    stored = (_read("uint8"), _read("float32"), _read("uint64"), _written("float32"))
    tables, chosen = (_read("float32"), _read("uint8")), (_written("float32"), _written("uint8"))
    return FourBits(
        _compiled(put, None, *stored),
        _compiled(add, "int32", *stored),
        _compiled(nearest, None, _read("float32"), *tables, *chosen),
        _compiled(merge, "int32", *stored, *tables, *chosen),
    )


def _levels(packed: Any, block: Any, half: Any, pairs: Any, held: Any) -> None:
    """The levels of one block's codes."""
    source = packed[block * half : block * half + half]
    for i in range(half):
        held[i] = pairs[source[i]]


def _add_scaled(levels: Any, scale: Any, part: Any, blocksize: Any) -> None:
    for i in range(blocksize):
        part[i] = part[i] + levels[i] * scale


def _largest(values: Any, size: Any) -> Any:
    """The largest bits of floats, without sign: infinity's or more when one isn't finite."""
    bits, largest = values.view(np.int32), np.int32(0)
    for i in range(size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


def _fifteen(bounds: Any) -> Any:
    """The bounds, where the compiler knows that nothing written changes them."""
    low = (bounds[0], bounds[1], bounds[2], bounds[3], bounds[4], bounds[5], bounds[6], bounds[7])
    return (*low, bounds[8], bounds[9], bounds[10], bounds[11], bounds[12], bounds[13], bounds[14])


def _ranks(part: Any, absmax: Any, limits: Any, ranks: Any, blocksize: Any) -> None:
    """How many of the limits lie below each value over absmax: by halves, without a branch."""
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = limits
    factor = _ONE / max(absmax, _TINY)
    for i in range(blocksize):
        value = part[i] * factor
        eight = value > b7
        middle = b11 if eight else b3
        low = b9 if eight else b1
        high = b13 if eight else b5
        first = b8 if eight else b0
        second = b10 if eight else b2
        third = b12 if eight else b4
        fourth = b14 if eight else b6
        four = value > middle
        middle = high if four else low
        low = third if four else first
        high = fourth if four else second
        two = value > middle
        one = value > (high if two else low)
        ranks[i] = np.uint8(
            (np.int32(eight) << 3) | (np.int32(four) << 2) | (np.int32(two) << 1) | np.int32(one)
        )


def _pack(both: Any, rising: Any, labels: Any, target: Any, half: Any) -> None:
    """One block's codes, two to a byte; where levels don't rise with their codes, by the labels."""
    for i in range(half):  # of two ranks the first is the low byte
        target[i] = np.uint8((both[i] << np.uint16(4)) | (both[i] >> np.uint16(8)))
    if not rising:
        for i in range(half):
            target[i] = labels[target[i]]


@dataclass(frozen=True)
class BFloat16:
    """The loops for bfloat16, as uint16 bits.

    add(bits, rows): the values added to `rows`; returns the largest bits of a sum without sign.
    nearest(rows, bits): float32 rounded to nearest with ties to even; NaN becomes 0x7FC0.
    merge(bits, rows, result): `add`, then `nearest`.
    """

    add: Function
    nearest: Function
    merge: Function


@cache
def _bfloat16() -> BFloat16:
    _parts()

    def add(bits: Any, rows: Any) -> Any:
        wide, largest = np.empty(_PART, np.uint32), np.int32(0)
        for i in range(0, rows.size, _PART):
            largest = max(largest, _add_wide(bits[i : i + _PART], rows[i : i + _PART], wide))
        return largest

    def nearest(rows: Any, bits: Any) -> None:
        _round(rows, bits)

    def merge(bits: Any, rows: Any, result: Any) -> Any:
        wide, largest = np.empty(_PART, np.uint32), np.int32(0)
        for i in range(0, rows.size, _PART):
            part = rows[i : i + _PART]
            largest = max(largest, _add_wide(bits[i : i + _PART], part, wide))
            _round(part, result[i : i + _PART])
        return largest

    stored, chosen = (_read("uint16"), _written("float32")), _written("uint16")
    return BFloat16(
        _compiled(add, "int32", *stored),
        _compiled(nearest, None, _read("float32"), chosen),
        _compiled(merge, "int32", *stored, chosen),
    )


def _add_wide(bits: Any, part: Any, wide: Any) -> Any:
    values = wide.view(np.float32)
    for i in range(part.size):
        wide[i] = np.uint32(bits[i]) << np.uint32(16)
    for i in range(part.size):
        part[i] = part[i] + values[i]
    return _largest(part, part.size)


def _round(part: Any, bits: Any) -> None:
    wide = part.view(np.uint32)
    for i in range(wide.size):
        value = wide[i]
        rounded = (value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        number = (value & np.uint32(0x7FFFFFFF)) <= np.uint32(INFINITE)
        bits[i] = np.uint16(rounded if number else np.uint32(0x7FC0))


@cache
def _parts() -> None:
    """Have compiled functions take these into themselves."""
    part = import_module("numba.extending").register_jitable(inline="always")
    for function in (_levels, _add_scaled, _largest, _fifteen, _ranks, _pack, _add_wide, _round):
        part(function)


def four_bits(blocksize: int) -> FourBits:
    """The loops for blocks of an even number of values."""
    with _compiling:
        return _four_bits(blocksize)


def bfloat16() -> BFloat16:
    """The loops for bfloat16."""
    with _compiling:
        return _bfloat16()


def _read(dtype: str) -> Any:
    """The type of a flat array that is only read."""
    types = import_module("numba").types
    return types.Array(getattr(types, dtype), 1, "C", readonly=True)


def _written(dtype: str) -> Any:
    types = import_module("numba").types
    return types.Array(getattr(types, dtype), 1, "C")


def _compiled(function: Function, result: str | None, *arguments: Any) -> Function:
    """A function compiled for these types, or taken from the cache; other threads run while it does."""
    numba = import_module("numba")
    signature = (numba.types.void if result is None else getattr(numba.types, result))(*arguments)
    try:
        compiled: Function = numba.njit(signature, nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder that the cache could be in
        compiled = numba.njit(signature, nogil=True, error_model="numpy")(function)
    return compiled
