"""NF4 and FP4 against bitsandbytes itself, on tensors that no kernel has touched."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vera_edge import formats
from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.formats import Bnb4Weight, codes4, nested
from vera_edge.storage.tensors import TensorFolder

STORAGES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

pytestmark = pytest.mark.usefixtures("either_way")


def bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def truth(packed: torch.Tensor, state: bnb.QuantState) -> npt.NDArray[np.float32]:
    """bitsandbytes' dequantization by its portable kernel.

    Its AVX512 kernel is no truth where a row isn't whole blocks: it takes the scale of the wrong block (seen
    with 0.50.2: 64 x 96 values in blocks of 64). Where rows are whole blocks both must agree.
    """
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = _dequantize_4bit_compute.__wrapped__(  # uncompiled
        packed.contiguous().view(torch.uint8).reshape(-1),
        absmax,
        state.code,
        state.blocksize,
        state.shape,
        torch.float32,
    ).numpy()
    if state.shape[-1] % state.blocksize == 0 and state.blocksize < 2048:  # above, bitsandbytes compiles
        assert np.array_equal(values, bnb.dequantize_4bit(packed, state).float().numpy())
    return values


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def save(folder: Path, packed: torch.Tensor, state: bnb.QuantState, module: str = "m.0.fc") -> TensorFolder:
    """Write one linear as transformers writes it."""
    tensors = {f"{module}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({f"{module}.weight": packed, **tensors}, folder / "model.safetensors")
    return TensorFolder.open(folder)


def load(folder: TensorFolder, module: str = "m.0.fc") -> Bnb4Weight:
    weight = formats.load(folder, formats.find_linears(folder, {})[module])
    assert isinstance(weight, Bnb4Weight)
    return weight


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_are_bitsandbytes_own(quant_type: str) -> None:
    own = bnb.get_4bit_type(quant_type, device="cpu").numpy()
    assert np.array_equal(bits(codes4.LEVELS[quant_type]), bits(own))


def test_code_book_is_bitsandbytes_own() -> None:
    """Made by torch.linspace, whose kernels round once; those for processors without FMA do so twice."""
    ours, theirs = nested.code_book(), bnb.create_dynamic_map().numpy()
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        np.testing.assert_allclose(ours, theirs, rtol=2 * 2**-23, atol=0)
    else:
        assert np.array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("exponent", [-40, -31, -3, 0, 30])
def test_codes_at_the_bounds_between_levels(quant_type: str, exponent: int) -> None:
    """Values on a bound, and a few steps of float32 to both sides of it, in whole blocks and a short one."""
    levels = np.sort(codes4.LEVELS[quant_type])
    bounds = (levels[:-1] + levels[1:]) / np.float32(2)
    rng = np.random.default_rng(4)
    absmax = (rng.uniform(1, 2, 500) * 10.0**exponent).astype(np.float32)
    values = rng.choice(bounds, (500, 64)) * absmax[:, None]
    toward = rng.choice(np.array([-np.inf, 0, np.inf], np.float32), values.shape)
    for _ in range(3):
        values = np.nextafter(values, np.where(rng.random(values.shape) < 0.5, toward, values))
    values[:, 5] = absmax
    values[7] = 0
    flat = values.reshape(-1)[:-20]
    codes, found = codes4.block_codes(flat, 64, quant_type)
    packed, state = bnb.quantize_4bit(torch.from_numpy(flat), blocksize=64, quant_type=quant_type)
    assert np.array_equal(bits(found), bits(state.absmax.numpy()))
    assert np.array_equal(codes4.pack(codes), packed.numpy().reshape(-1))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (70, 130), (8, 4096)])
def test_dequantizes_bit_for_bit(
    tmp_path: Path, quant_type: str, blocksize: int, double: bool, shape: tuple[int, int]
) -> None:
    packed, state = bnb.quantize_4bit(
        random_weight(shape), blocksize=blocksize, compress_statistics=double, quant_type=quant_type
    )
    values = truth(packed, state)
    weight = load(save(tmp_path, packed, state))
    assert np.array_equal(bits(formats.dequantize(weight)), bits(values))
    start, stop = shape[0] // 3, shape[0] - 1
    assert np.array_equal(bits(weight.rows(start, stop)), bits(values[start:stop]))


@pytest.mark.parametrize("storage", list(STORAGES))
@pytest.mark.parametrize("double", [False, True])
def test_any_storage_dtype(tmp_path: Path, storage: str, double: bool) -> None:
    packed, state = bnb.quantize_4bit(
        random_weight((64, 96)),
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=STORAGES[storage],
    )
    weight = load(save(tmp_path, packed, state))
    assert weight.storage == storage
    assert np.array_equal(bits(formats.dequantize(weight)), bits(truth(packed, state)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_state_is_read_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    packed, state = bnb.quantize_4bit(random_weight((96, 64)).to(dtype), quant_type="nf4")
    weight = load(save(tmp_path, packed, state))
    rounded = torch.from_numpy(formats.dequantize(weight)).to(dtype)
    assert torch.equal(rounded, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 512])
@pytest.mark.parametrize("storage", list(STORAGES))
def test_quantizes_byte_for_byte(quant_type: str, blocksize: int, storage: str) -> None:
    weight = random_weight((96, 160), seed=3)
    weight[5] = 0  # whole blocks of zeros
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, quant_storage=STORAGES[storage]
    )
    form = formats.get(quant_type)
    options = form.options({"blocksize": blocksize, "storage": storage})
    mine = form.quantize(weight.numpy(), options).tensors()
    theirs = state.as_dict(packed=True)
    assert mine[".weight"].data.tobytes() == packed.contiguous().view(torch.uint8).numpy().tobytes()
    assert mine[".weight"].shape == tuple(packed.shape)
    for key, value in theirs.items():
        assert mine[f".weight.{key}"].data.tobytes() == value.numpy().tobytes(), key
    assert {suffix: (raw.dtype, raw.shape) for suffix, raw in mine.items()} == form.layout((96, 160), options)


@pytest.mark.parametrize("shape", [(5, 13), (33, 31), (1, 1)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantizes_odd_shapes_byte_for_byte(shape: tuple[int, int], quant_type: str) -> None:
    weight = random_weight(shape, seed=4)
    packed, state = bnb.quantize_4bit(weight, blocksize=32, quant_type=quant_type)
    form = formats.get(quant_type)
    mine = form.quantize(weight.numpy(), form.options({"blocksize": 32}))
    assert isinstance(mine, Bnb4Weight)
    assert mine.packed.tobytes() == packed.numpy().tobytes()
    assert mine.absmax.tobytes() == state.absmax.numpy().tobytes()


def test_bounds_and_extremes_fall_as_bitsandbytes_has_them() -> None:
    for quant_type in ("nf4", "fp4"):
        levels = np.sort(codes4.LEVELS[quant_type])
        bounds = (levels[:-1] + levels[1:]) / np.float32(2)
        near = np.concatenate([np.nextafter(bounds, -2), bounds, np.nextafter(bounds, 2), levels, [0, -0.0]])
        values = np.resize(near.astype(np.float32), (4, 64))
        values[:, 0] = 1.0  # absmax 1: the values stand as they are
        packed, _ = bnb.quantize_4bit(torch.from_numpy(values), quant_type=quant_type)
        form = formats.get(quant_type)
        mine = form.quantize(values, form.options({}))
        assert isinstance(mine, Bnb4Weight)
        assert mine.packed.tobytes() == packed.numpy().tobytes()


def test_double_quantization_matches_given_the_same_offset() -> None:
    weight = random_weight((512, 384), seed=5)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    form = formats.get("nf4")
    mine = form.quantize(weight.numpy(), form.options({"double_quant": True}))
    assert isinstance(mine, Bnb4Weight)
    assert mine.nested is not None
    assert mine.packed.tobytes() == packed.numpy().tobytes()
    # torch's float32 mean depends on its threads; a float64 mean differs in the last places only.
    assert abs(float(mine.nested.offset) - state.offset.item()) <= 4 * np.spacing(
        np.float32(state.offset.item())
    )
    _, plain_state = bnb.quantize_4bit(weight, quant_type="nf4")
    values = plain_state.absmax - torch.tensor(float(mine.nested.offset))
    codes, blockwise = bnb.quantize_blockwise(values, blocksize=256)
    assert mine.nested.codes.tobytes() == codes.numpy().tobytes()
    assert mine.nested.scales.tobytes() == blockwise.absmax.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 5, 7, 8, 9, 31, 33, 64, 160, 511, 513, 4096, 9999, 32767])
def test_the_offset_is_torch_s_own_mean(count: int) -> None:
    """Below 32768 blocks one thread adds, in vectors of 8 floats whatever the processor has."""
    for seed in range(20):
        values = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1
        mine = nested.torch_sum(values.numpy()) / np.float32(count)
        assert mine == np.float32(values.mean().item())


def test_absmax_all_alike_survive_double_quantization() -> None:
    weight = np.where(np.arange(64 * 64).reshape(64, 64) % 2, np.float32(0.5), np.float32(-0.5))
    form = formats.get("nf4")
    mine = form.quantize(weight.astype(np.float32), form.options({"double_quant": True}))
    assert np.array_equal(formats.dequantize(mine), weight)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 40),
    half=st.integers(1, 60),
    blocksize=st.sampled_from([32, 64, 128]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    scale=st.floats(1e-6, 1e4),
)
def test_quantizing_dequantized_values_gives_them_back(
    seed: int, out: int, half: int, blocksize: int, quant_type: str, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((out, 2 * half)) * scale).astype(np.float32)
    form = formats.get(quant_type)
    options = form.options({"blocksize": blocksize})
    once = form.quantize(weight, options)
    twice = form.quantize(formats.dequantize(once), options)
    assert np.array_equal(bits(formats.dequantize(twice)), bits(formats.dequantize(once)))


@settings(max_examples=40, deadline=None)
@given(
    offset=st.floats(width=32, allow_nan=False, allow_infinity=False),
    out=st.integers(1, 1 << 20),
    inside=st.integers(1, 1 << 20),
)
def test_the_state_text_always_fits_its_place(offset: float, out: int, inside: int) -> None:
    state = {"quant_type": "nf4", "nested_blocksize": 256, "shape": [out, inside], "nested_offset": offset}
    from vera_edge.formats.bnb4 import _state_size

    assert len(json.dumps(state)) <= _state_size(
        (out, inside), {"quant_type": "nf4", "nested_blocksize": 256}
    )


def test_bitsandbytes_reads_what_is_written(tmp_path: Path) -> None:
    weight = random_weight((96, 64), seed=6)
    form = formats.get("nf4")
    mine = form.quantize(weight.numpy(), form.options({"double_quant": True, "storage": "BF16"}))
    tensors = mine.tensors()
    state = {
        suffix.removeprefix(".weight."): torch.from_numpy(raw.array().copy())
        for suffix, raw in tensors.items()
        if suffix != ".weight"
    }
    quant_state = bnb.QuantState.from_dict(state, torch.device("cpu"))
    packed = torch.from_numpy(tensors[".weight"].data.copy()).view(torch.bfloat16).reshape(-1, 1)
    assert np.array_equal(
        bits(bnb.dequantize_4bit(packed, quant_state).numpy()), bits(formats.dequantize(mine))
    )


class TestRefused:
    """Each sentence says which tensor of which file is wrong."""

    def parts(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        packed, state = bnb.quantize_4bit(random_weight((64, 64)), quant_type="nf4", compress_statistics=True)
        return packed, dict(state.as_dict(packed=True))

    def open(self, folder: Path, packed: torch.Tensor, state: dict[str, torch.Tensor]) -> TensorFolder:
        tensors = {f"fc.weight.{key}": value for key, value in state.items()}
        save_file({"fc.weight": packed, **tensors}, folder / "model.safetensors")
        return TensorFolder.open(folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("shape", [64, 65]),
            ("shape", [64]),
            ("shape", [-64, -64]),
            ("shape", "64x64"),
            ("blocksize", 0),
            ("blocksize", 63),
            ("blocksize", 2.5),
            ("blocksize", 128),
            ("nested_blocksize", 16),
            ("nested_offset", None),
            ("nested_offset", float("nan")),
            ("quant_type", "fp4"),
            ("dtype", "int8"),
        ],
    )
    def test_a_state_that_does_not_fit(self, tmp_path: Path, key: str, value: object) -> None:
        packed, state = self.parts()
        name = "quant_state.bitsandbytes__nf4"
        text = json.loads(state[name].numpy().tobytes()) | {key: value}
        state[name] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
        folder = self.open(tmp_path, packed, state)
        with pytest.raises(CheckpointError, match=r"fc\.weight.*model\.safetensors"):
            formats.find_linears(folder, {})

    @pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff" * 100, b" " * (1 << 17), b"[" * 60000])
    def test_a_state_that_is_no_json_object(self, tmp_path: Path, text: bytes) -> None:
        packed, state = self.parts()
        state["quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        folder = self.open(tmp_path, packed, state)
        with pytest.raises(CheckpointError, match="isn't the JSON object"):
            formats.find_linears(folder, {})

    def test_a_missing_part(self, tmp_path: Path) -> None:
        packed, state = self.parts()
        del state["nested_absmax"]
        folder = self.open(tmp_path, packed, state)
        with pytest.raises(CheckpointError, match=r"nested_absmax .*is missing"):
            formats.find_linears(folder, {})

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_scales_that_are_not_finite(self, tmp_path: Path, bad: float) -> None:
        packed, state = self.parts()
        state["nested_absmax"][0] = bad
        with pytest.raises(CheckpointError, match=r"absmax of .*model\.safetensors gives NaN or infinite"):
            load(self.open(tmp_path, packed, state), "fc")

    def test_another_code_table(self, tmp_path: Path) -> None:
        packed, state = self.parts()
        state["quant_map"] = state["quant_map"] * 0.9
        with pytest.raises(FormatError, match="quant_map isn't bitsandbytes' nf4 table"):
            load(self.open(tmp_path, packed, state), "fc")

    def test_options_bitsandbytes_could_not_read(self) -> None:
        form = formats.get("nf4")
        with pytest.raises(PlanError, match="block size 48"):
            form.options({"blocksize": 48})
        with pytest.raises(PlanError, match="no option 'group'"):
            form.options({"group": 3})
        with pytest.raises(PlanError, match="whole F32 words"):
            form.layout((3, 2), form.options({"storage": "F32"}))
