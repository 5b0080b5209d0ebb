"""HQQ's groups run over the ends of rows where their size doesn't divide the inputs, in numpy by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from vera_edge.base.checkpoint import Checkpoint

OUT, IN, GROUP = 6, 192, 128
MODULE = "model.layers.0.mlp.up_proj"


def write(folder: Path, axis: int) -> npt.NDArray[np.float32]:
    """A weight of 8 bits, and its values."""
    draw = np.random.default_rng(axis)
    shape = (OUT * IN // GROUP, GROUP) if axis == 1 else (GROUP, OUT * IN // GROUP)
    groups = (shape[0], 1) if axis == 1 else (1, shape[1])
    codes = draw.integers(0, 256, shape).astype(np.uint8)
    scales = draw.uniform(0.01, 0.1, groups).astype(np.float16)
    zeros = draw.uniform(100, 150, groups).astype(np.float16)
    tensors: dict[str, Any] = {
        "W_q": codes,
        "scale": scales,
        "zero": zeros,
        "shape": np.array([OUT, IN]),
        "packing": np.frombuffer(b"8bit_u8", np.uint8),
        "axis": np.array(axis, np.int32),
        "group_size": np.array(GROUP, np.int32),
    }
    save_file({f"{MODULE}.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(config))
    values = (codes.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32)
    return values.reshape(OUT, IN)


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_run_over_the_ends_of_rows(axis: int, tmp_path: Path) -> None:
    expected = write(tmp_path, axis)
    checkpoint = Checkpoint.open(tmp_path)
    np.testing.assert_array_equal(checkpoint.dequantize(MODULE), expected)
    np.testing.assert_array_equal(checkpoint.load(MODULE).rows(1, 4), expected[1:4])
