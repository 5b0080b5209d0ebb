"""LLM.int8 against bitsandbytes' own row-wise quantization."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vera_edge import formats
from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.formats import Int8Weight
from vera_edge.storage.tensors import TensorFolder


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def save(folder: Path, codes: torch.Tensor, scales: torch.Tensor, order: int | None = 0) -> TensorFolder:
    tensors = {"h.0.fc.weight": codes, "h.0.fc.SCB": scales}
    if order is not None:
        tensors["h.0.fc.weight_format"] = torch.tensor(order, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    return TensorFolder.open(folder)


def load(tensors: TensorFolder) -> Int8Weight:
    weight = formats.load(tensors, formats.find_linears(tensors, {})["h.0.fc"])
    assert isinstance(weight, Int8Weight)
    return weight


@pytest.mark.parametrize("order", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantizes_bit_for_bit(tmp_path: Path, order: int | None, dtype: torch.dtype) -> None:
    codes, scales, _ = bnb.int8_vectorwise_quant(random_weight((48, 70)).to(dtype))
    truth = bnb.int8_vectorwise_dequant(codes, scales).numpy()
    weight = load(save(tmp_path, codes, scales, order))
    assert np.array_equal(formats.dequantize(weight).view(np.uint32), truth.view(np.uint32))
    assert np.array_equal(weight.rows(7, 20), truth[7:20])


@pytest.mark.parametrize("shape", [(48, 70), (1, 1), (3, 4097)])
def test_quantizes_byte_for_byte(shape: tuple[int, int]) -> None:
    weight = random_weight(shape, seed=1)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.clone())
    form = formats.get("int8")
    mine = form.quantize(weight.numpy(), form.options({}))
    tensors = mine.tensors()
    assert tensors[".weight"].data.tobytes() == codes.numpy().tobytes()
    assert tensors[".SCB"].data.tobytes() == scales.numpy().tobytes()
    assert {suffix: (raw.dtype, raw.shape) for suffix, raw in tensors.items()} == form.layout(shape, {})


def test_values_in_the_middle_between_two_codes() -> None:
    """bitsandbytes multiplies by 127 times the reciprocal, which 127 / absmax may lie beside."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randint(-128, 129, (400, 64), generator=draw).to(torch.bfloat16) / 256
    weight[:, 0] = torch.randint(64, 200, (400,), generator=draw).to(torch.bfloat16) / 256
    codes, _, _ = bnb.int8_vectorwise_quant(weight.half())
    mine = formats.get("int8").quantize(weight.float().numpy(), {})
    assert mine.tensors()[".weight"].data.tobytes() == codes.numpy().tobytes()


def test_a_row_of_zeros_stays_zero() -> None:
    form = formats.get("int8")
    weight = random_weight((4, 16)).numpy()
    weight[2] = 0
    assert not formats.dequantize(form.quantize(weight, {}))[2].any()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    out=st.integers(1, 20),
    inside=st.integers(1, 80),
    scale=st.floats(1e-6, 1e6),
)
def test_quantizing_dequantized_values_gives_the_codes_back(
    seed: int, out: int, inside: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    form = formats.get("int8")
    once = form.quantize((rng.standard_normal((out, inside)) * scale).astype(np.float32), {})
    twice = form.quantize(formats.dequantize(once), {})
    assert isinstance(once, Int8Weight)
    assert isinstance(twice, Int8Weight)
    assert np.array_equal(twice.codes, once.codes)
    assert np.allclose(twice.scales, once.scales, rtol=3e-7)


class TestRefused:
    def test_scales_of_another_size(self, tmp_path: Path) -> None:
        tensors = save(tmp_path, torch.zeros(4, 6, dtype=torch.int8), torch.ones(5))
        with pytest.raises(CheckpointError, match=r"h\.0\.fc\.SCB .* needs 4 floats"):
            formats.find_linears(tensors, {})

    def test_no_weight_beside_the_scales(self, tmp_path: Path) -> None:
        tensors = save(tmp_path, torch.zeros(4, 6), torch.ones(4))
        with pytest.raises(CheckpointError, match=r"no int8 h\.0\.fc\.weight"):
            formats.find_linears(tensors, {})

    def test_a_tile_order(self, tmp_path: Path) -> None:
        tensors = save(tmp_path, torch.zeros(4, 6, dtype=torch.int8), torch.ones(4), order=2)
        with pytest.raises(FormatError, match="GPU tile order"):
            load(tensors)

    def test_scales_that_are_not_finite(self, tmp_path: Path) -> None:
        scales = torch.tensor([1.0, float("nan"), 1.0, 1.0])
        with pytest.raises(CheckpointError, match="SCB holds NaN"):
            load(save(tmp_path, torch.zeros(4, 6, dtype=torch.int8), scales))

    def test_an_option(self) -> None:
        with pytest.raises(PlanError, match="int8 takes no option 'blocksize'"):
            formats.get("int8").options({"blocksize": 64})
