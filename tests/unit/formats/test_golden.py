"""Every format against checkpoints that its own library wrote, and the values that library gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vera_edge import formats
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.formats import affine
from vera_edge.storage.tensors import TensorFolder

GOLDEN = Path(__file__).parents[2] / "golden" / "formats"
CASES = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))
FORMATS = {"awq": 1, "compressed_tensors": 12, "fp8": 2, "gptq": 10, "hqq": 9, "torchao": 5}


def _name(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


def test_no_golden_checkpoint_is_lost() -> None:
    found = {name: sum(path.parent.name == name for path in CASES) for name in FORMATS}
    assert found == FORMATS


@pytest.mark.parametrize("folder", CASES, ids=_name)
def test_values_are_the_librarys_own(folder: Path) -> None:
    checkpoint, expected = Checkpoint.open(folder), TensorFolder.open(folder, "expected")
    assert set(checkpoint.linears) == set(expected)
    for module in expected:
        linear = checkpoint.linears[module]
        assert linear.format == {"compressed_tensors": "compressed-tensors"}.get(
            folder.parent.name, folder.parent.name
        )
        np.testing.assert_array_equal(checkpoint.dequantize(module), expected.float32(module), strict=True)


@pytest.mark.parametrize("folder", CASES, ids=_name)
def test_any_rows_can_be_had_alone(folder: Path) -> None:
    """`rows` is called in pieces that need not begin at a word's or a group's edge."""
    checkpoint = Checkpoint.open(folder)
    for module, linear in checkpoint.linears.items():
        weight, whole = checkpoint.load(module), checkpoint.dequantize(module)
        for start, stop in ((0, 1), (3, 4), (5, 19), (linear.out_features - 1, linear.out_features)):
            np.testing.assert_array_equal(weight.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("folder", CASES, ids=_name)
def test_stored_tensors_come_back_byte_for_byte(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for module, linear in checkpoint.linears.items():
        given = checkpoint.load(module).tensors()
        assert {f"{module}{suffix}" for suffix in given} == set(linear.tensors.values())
        for suffix, raw in given.items():
            stored = checkpoint.tensors.read(f"{module}{suffix}")
            assert (raw.dtype, raw.shape) == (stored.dtype, stored.shape)
            np.testing.assert_array_equal(raw.data, stored.data)


@pytest.mark.parametrize("case", ["gptq/b4-sym-gptq", "gptq/b3-asym-gptq_v2", "gptq/b8-sym-gptq", "awq/gemm"])
def test_the_librarys_codes_pack_to_the_librarys_bytes(case: str) -> None:
    """Codes, scales and zeros taken from a library's checkpoint and packed again give its tensors."""
    checkpoint = Checkpoint.open(GOLDEN / case)
    (module, linear), *_ = checkpoint.linears.items()
    weight_format, weight = formats.get(linear.format), checkpoint.load(module)
    scales, zeros = weight.scales.T, weight.zeros.T  # type: ignore[attr-defined]
    wide = [np.repeat(part, linear.in_features // scales.shape[1], axis=1) for part in (scales, zeros)]
    codes = np.rint(checkpoint.dequantize(module) / wide[0] + wide[1]).astype(np.uint8)
    grid = affine.AffineParams(codes, np.ascontiguousarray(scales), np.ascontiguousarray(zeros))
    packed = weight_format.pack(grid, weight_format.options_of(linear))  # type: ignore[attr-defined]
    for suffix, raw in packed.tensors().items():
        np.testing.assert_array_equal(raw.data, checkpoint.tensors.read(f"{module}{suffix}").data)
