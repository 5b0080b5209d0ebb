"""Codes and rounded weights as bytes, against the gguf package's reading and llama.cpp's own quantizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from vera_edge.requantize import GGML_GRIDS, CodesFolder, requantize
from vera_edge_gguf import blocks, nearest, tensor_types

# SHA-256, its first half, of what ggml_quantize_chunk (llama-cpp-python 0.3.36) made of `weight()`.
BY_GGML = {
    "q8_0": "4b8c4a13e5a875fb4affbfbe8ed8925d",
    "q5_1": "df566e2a8daddb4f3372630dd8c98cee",
    "q5_0": "ab79f96aa560ab9ca1614ffa93bca5ef",
    "q4_1": "3c1ddd09430267657150baa33d4a9e6c",
    "q4_0": "3f6e19805b9ac276ac9897938819073c",
}

# Its squared error for types whose scales are searched for.
BY_GGML_SQUARES = {"q4_k": 0.08104, "q5_k": 0.02129, "q6_k": 0.00518, "iq4_nl": 0.09238}


def weight() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """(16, 256), with one block of zeros."""
    drawn = np.random.RandomState(5).standard_normal((16, 256)) / 16
    drawn[3, 32:64] = 0
    return drawn.astype(np.float32)


@pytest.mark.parametrize("stored", sorted(BY_GGML))
def test_rounding_to_nearest_gives_llama_cpps_bytes(stored: str) -> None:
    found = blocks.rounded("a weight", weight(), stored)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:32] == BY_GGML[stored]


@pytest.mark.parametrize("stored", sorted(BY_GGML))
def test_compiled_loops_give_the_gguf_packages_bytes(stored: str) -> None:
    """Of values that lie halfway between two codes, of blocks of one value, of the largest on either side."""
    values = np.random.RandomState(9).standard_normal((24, 96)).astype(np.float32)
    values[0], values[1, :32], values[2, :32] = 0, 0.75, -0.75
    values[3] = np.arange(-48, 48) / 2
    values[4, 5], values[4, 50] = 9, -9
    found = nearest.rounded(values, stored)
    assert np.array_equal(found.reshape(24, -1), gguf.quants.quantize(values, tensor_types.ggml_type(stored)))


def test_six_bits_lose_no_more_than_in_llama_cpp() -> None:
    """Read by the gguf package; squared error after ggml_quantize_chunk (llama-cpp-python 0.3.36)."""
    found = blocks.rounded("a weight", weight(), "q6_k").reshape(16, -1)
    read = gguf.quants.dequantize(found, gguf.GGMLQuantizationType.Q6_K)
    assert float(((weight() - read) ** 2).sum()) < BY_GGML_SQUARES["q6_k"]
    assert not read[3, 32:64].any()


@pytest.mark.parametrize("method", ["search", "gptq"])
@pytest.mark.parametrize("stored", sorted(GGML_GRIDS))
def test_packed_codes_mean_to_the_gguf_package_what_they_mean_here(stored: str, method: str) -> None:
    inputs = np.random.RandomState(6).standard_normal((600, 256)).astype(np.float32)
    codes = requantize(weight(), GGML_GRIDS[stored], method, inputs.T @ inputs)
    packed = blocks.packed(codes)
    assert packed.size == blocks.size(stored, (16, 256))
    read = gguf.quants.dequantize(packed.reshape(16, -1), tensor_types.ggml_type(stored))
    assert np.array_equal(read, codes.dequantize())
    # Compensation also uses weights that are zero to make up for others' errors.
    assert method == "gptq" or not read[3, 32:64].any()


@pytest.mark.parametrize("stored", sorted(GGML_GRIDS))
def test_compensation_makes_up_for_errors_on_llama_cpps_grids(stored: str) -> None:
    """The measure is the layer's output error, on inputs that depend on each other."""
    draw = np.random.RandomState(7)
    inputs = (draw.standard_normal((2000, 256)) @ draw.standard_normal((256, 256))).astype(np.float32)
    gram = inputs.T @ inputs

    def error(method: str) -> float:
        left = weight() - requantize(weight(), GGML_GRIDS[stored], method, gram).dequantize()
        return float(((left @ gram) * left).sum())

    assert error("gptq") < 0.6 * error("search")


@pytest.mark.parametrize("stored", ["q4_0", "q4_1", "q5_k", "q6_k"])
def test_codes_come_back_from_the_disk_as_they_were(stored: str, tmp_path: Path) -> None:
    codes = requantize(weight(), GGML_GRIDS[stored], "search")
    folder = CodesFolder(tmp_path)
    folder.put("a", codes)
    assert np.array_equal(folder["a"].dequantize(), codes.dequantize())
    assert np.array_equal(blocks.packed(folder["a"]), blocks.packed(codes))


@pytest.mark.parametrize("stored", ["q4_k", "q5_k", "q6_k", "iq4_nl"])
def test_a_search_for_scales_loses_about_what_llama_cpps_does(stored: str) -> None:
    """Squared error of `weight()` after ggml_quantize_chunk (llama-cpp-python 0.3.36)."""
    left = weight() - requantize(weight(), GGML_GRIDS[stored], "search").dequantize()
    assert float((left**2).sum()) < 1.15 * BY_GGML_SQUARES[stored]


def test_codes_on_several_threads_are_the_same_bytes() -> None:
    wide = np.random.RandomState(8).standard_normal((9000, 256)).astype(np.float32)
    inputs = np.random.RandomState(6).standard_normal((600, 256)).astype(np.float32)
    gram = inputs.T @ inputs
    one, two = (requantize(wide, GGML_GRIDS["q4_k"], "gptq", gram, threads=count) for count in (1, 2))
    assert np.array_equal(blocks.packed(one), blocks.packed(two))


def test_a_value_beyond_float16_is_refused() -> None:
    from vera_edge.errors import PlanError

    with pytest.raises(PlanError, match="has values beyond fp16's largest"):
        blocks.rounded("blk.0.ffn_up.weight", weight() * np.float32(1e7), "fp16")
