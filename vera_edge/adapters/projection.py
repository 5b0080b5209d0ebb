"""The frozen projections of VeRA, regenerated from a seed bit for bit as PEFT drew and rounded them.

PEFT draws A and then B from one `torch.Generator("cpu").manual_seed(seed)` with `uniform_(-bound, bound)`,
bound = sqrt(3) * sqrt(2) / sqrt(fan_in) (`_kaiming_init` in peft/tuners/vera/model.py). torch's CPU
generator is the 32-bit Mersenne Twister with the classic initialisation from the low 32 bits of the seed; it
takes one draw per float32 in row-major order and keeps the low 24 bits (ATen/core/TransformationHelper.h).
numpy's legacy RandomState is the same generator, so nothing but numpy is needed here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.storage.files import open_atomic
from vera_edge.storage.tensors import bf16_to_float32, float32_to_bf16, write_header

ProjectionDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]
ROUNDINGS: tuple[ProjectionDtype, ...] = get_args(ProjectionDtype)

MAX_SIDE = 1 << 24
MAX_ELEMENTS = 1 << 30  # A and B together; 4 GiB in float32
_CHUNK = 1 << 20  # elements drawn at a time
_SEEDS = range(-(1 << 63), 1 << 64)  # what torch.Generator.manual_seed takes


@dataclass(frozen=True)
class ProjectionSpec:
    """All that determines a pair of projections, bit for bit.

    seed: the adapter's `projection_prng_key`; torch uses its low 32 bits.
    rank, in_max, out_max: A is (rank, in_max), B is (out_max, rank).
    rounding: the dtype that the drawn values were rounded to (to nearest, ties to even) before training.
    fused: whether `x * (high - low) + low` was rounded once (torch's AVX2, AVX-512 and, presumably, Arm
        kernels) or after each operation (its kernel for other processors).

    Raises AdapterError when a field is of the wrong type or out of bounds.
    """

    seed: int
    rank: int
    in_max: int
    out_max: int
    rounding: ProjectionDtype = "float32"
    fused: bool = True

    def __post_init__(self) -> None:
        if type(self.seed) is not int or self.seed not in _SEEDS:
            raise AdapterError(f"projection seed {self.seed!r} isn't an integer that torch takes as a seed")
        for name in ("rank", "in_max", "out_max"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_SIDE:
                raise AdapterError(f"projection {name} {value!r} isn't an integer from 1 to {MAX_SIDE}")
        if self.elements > MAX_ELEMENTS:
            raise AdapterError(
                f"projections of rank {self.rank} for {self.in_max} inputs and {self.out_max} outputs would "
                f"hold {self.elements} values; vera-edge takes at most {MAX_ELEMENTS}"
            )
        if self.rounding not in ROUNDINGS:
            raise AdapterError(f"projection rounding {self.rounding!r} isn't one of {', '.join(ROUNDINGS)}")
        if type(self.fused) is not bool:
            raise AdapterError(f"projection field fused is {self.fused!r}, not true or false")

    @property
    def elements(self) -> int:
        """The number of values in A and B together."""
        return self.rank * (self.in_max + self.out_max)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON object; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ProjectionSpec:
        """The spec that `to_dict` wrote. Raises AdapterError on a missing, unknown or bad field."""
        if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
            raise AdapterError(
                f"a projection spec must have exactly the fields {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**value)


@dataclass(frozen=True, eq=False)
class Projections:
    """The shared projections: `a` (rank, in_max) and `b` (out_max, rank), float32, read-only.

    They're regenerated from `spec`, or were saved with the adapter; then `spec` is the nearest description.
    """

    spec: ProjectionSpec
    a: Float32
    b: Float32

    def __post_init__(self) -> None:
        spec = self.spec
        for name, array, shape in (
            ("vera_A", self.a, (spec.rank, spec.in_max)),
            ("vera_B", self.b, (spec.out_max, spec.rank)),
        ):
            if array.shape != shape or array.dtype != np.float32:
                raise AdapterError(
                    f"{name} is {array.dtype} of shape {list(array.shape)} where the projection spec says "
                    f"float32 of shape {list(shape)}"
                )
        object.__setattr__(self, "a", _frozen(self.a))
        object.__setattr__(self, "b", _frozen(self.b))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the shapes and of A's and B's values as little-endian float32, row-major."""
        return _digest(self.spec, self)

    def delta(self, lambda_b: Float32, lambda_d: Float32, in_features: int) -> Float32:
        """What the adapter adds to one weight: diag(lambda_b) B[:out] diag(lambda_d) A[:, :in], float32.

        lambda_b: (out,), lambda_d: (rank,). Returns (out, in_features), the orientation of nn.Linear.
        The order of the products is PEFT's (`VeraLayer.get_delta_weight`).
        Raises MismatchError when a size doesn't fit the projections.
        """
        out_features = self.check(lambda_b, lambda_d, in_features)
        scaled_b = lambda_b[:, None] * self.b[:out_features]
        scaled_a = lambda_d[:, None] * self.a[:, :in_features]
        product: Float32 = scaled_b @ scaled_a
        return product

    def check(self, lambda_b: Float32, lambda_d: Float32, in_features: int) -> int:
        """The number of output features; raises MismatchError when a size doesn't fit the projections."""
        spec = self.spec
        if lambda_b.ndim != 1 or lambda_d.ndim != 1 or lambda_d.size != spec.rank:
            raise MismatchError(
                f"lambda_b of shape {list(lambda_b.shape)} and lambda_d of shape {list(lambda_d.shape)} "
                f"don't fit projections of rank {spec.rank}"
            )
        if not 1 <= in_features <= spec.in_max or not 1 <= lambda_b.size <= spec.out_max:
            raise MismatchError(
                f"a layer with {in_features} inputs and {lambda_b.size} outputs doesn't fit projections "
                f"made for at most {spec.in_max} inputs and {spec.out_max} outputs"
            )
        return lambda_b.size


def regenerate(spec: ProjectionSpec) -> Projections:
    """Draw both projections from the seed."""
    arrays = {"vera_A": np.empty((spec.rank, spec.in_max), np.float32)}
    arrays["vera_B"] = np.empty((spec.out_max, spec.rank), np.float32)
    for name, start, values in stream(spec):
        arrays[name].reshape(-1)[start : start + values.size] = values
    return Projections(spec, arrays["vera_A"], arrays["vera_B"])


def stream(spec: ProjectionSpec, chunk: int = _CHUNK) -> Iterator[tuple[str, int, Float32]]:
    """Draw the projections piece by piece: (name, flat start, values), vera_A first, then vera_B, row-major.

    Peak memory is a few times `chunk` values, whatever the size of the projections; the values don't
    depend on `chunk`.
    """
    generator = np.random.RandomState(spec.seed & 0xFFFFFFFF)
    # fan_in is the second dimension of either matrix, as torch.nn.init counts it.
    for name, size, fan_in in (
        ("vera_A", spec.rank * spec.in_max, spec.in_max),
        ("vera_B", spec.out_max * spec.rank, spec.rank),
    ):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan_in))
        for start in range(0, size, chunk):
            draws = generator.randint(0, 1 << 32, size=min(chunk, size - start), dtype=np.uint32)
            yield name, start, round_to(_uniform(draws, bound, spec.fused), spec.rounding)


def stream_digest(spec: ProjectionSpec) -> str:
    """`regenerate(spec).digest`, without ever holding the projections."""
    return _digest(spec, spec)


def write(source: Projections | ProjectionSpec, path: Path) -> str:
    """Write vera_A and vera_B as float32 safetensors to `path`, whole or not at all; returns their digest.

    A spec is drawn as it is written, so that memory stays bounded. Raises OutputError when the disk refuses.
    """
    spec = source if isinstance(source, ProjectionSpec) else source.spec
    shapes = {"vera_A": ("F32", (spec.rank, spec.in_max)), "vera_B": ("F32", (spec.out_max, spec.rank))}
    state = _digest_start(spec)
    with open_atomic(path) as file:
        write_header(file, shapes, {"format": "pt"})
        for values in _pieces(source):
            data = values.astype("<f4", copy=False).data
            state.update(data)
            file.write(data)
    return state.hexdigest()


def _pieces(source: Projections | ProjectionSpec) -> Iterator[Float32]:
    """The values of A, then B, as contiguous pieces in row-major order."""
    if isinstance(source, Projections):
        yield from (source.a, source.b)
    else:
        yield from (values for _, _, values in stream(source))


def round_to(values: Float32, rounding: ProjectionDtype) -> Float32:
    """`values` rounded to another float dtype (to nearest, ties to even) and widened back to float32.

    For float8_e4m3fn they must be within 448, its largest value; projections are within 2.5.
    """
    if rounding == "bfloat16":
        return bf16_to_float32(float32_to_bf16(values))
    if rounding == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if rounding == "float8_e4m3fn":
        # Three mantissa bits; below 2**-6 the values lie 2**-9 apart.
        step = np.ldexp(np.float32(1), np.maximum(np.frexp(values)[1] - 1, -6) - 3)
        rounded: Float32 = np.rint(values / step) * step
        return rounded
    return values


def _uniform(draws: npt.NDArray[np.uint32], bound: float, fused: bool) -> Float32:
    """torch's float32 `uniform_(-bound, bound)` from its raw 32-bit draws."""
    low = np.float32(-bound)
    span = np.float32(np.float32(bound) - low)
    mantissa = draws & np.uint32(0xFFFFFF)
    if fused:
        # The span is exactly -2 * low, so product and sum fit float64's 53 bits: the cast rounds once.
        return (mantissa * (float(span) * 2.0**-24) + float(low)).astype(np.float32)
    return mantissa.astype(np.float32) * np.float32(2.0**-24) * span + low


def _digest(spec: ProjectionSpec, source: Projections | ProjectionSpec) -> str:
    state = _digest_start(spec)
    for values in _pieces(source):
        state.update(values.astype("<f4", copy=False).data)
    return state.hexdigest()


def _digest_start(spec: ProjectionSpec) -> hashlib._Hash:
    return hashlib.sha256(f"vera_A {spec.rank} {spec.in_max} vera_B {spec.out_max} {spec.rank}\n".encode())


def _frozen(array: Float32) -> Float32:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
