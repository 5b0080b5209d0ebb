"""The arithmetic of a device, run on torch's own processor device, against the compiled loops."""

from __future__ import annotations

import pytest

from tests.unit.requantize.test_grids import GRIDS, gram, normal
from vera_edge.requantize import GGML_GRIDS, Gram, output_error, requantize
from vera_edge.requantize.torch_gram import TorchGram

ALL = {**GRIDS, **{name: GGML_GRIDS[name] for name in ("q4_0", "iq4_nl", "q4_k")}}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("inside", [256, 100])
def test_the_codes_are_those_of_the_processor(name: str, inside: int) -> None:
    grid = ALL[name]
    if grid.ggml and inside % 256:
        pytest.skip("llama.cpp's super-blocks are whole")
    weight, prepared = normal(48, inside), Gram.of(gram(inside), 0.1)
    on_device = TorchGram.placed(prepared, "cpu")
    one, other = (requantize(weight, grid, "gptq", some) for some in (prepared, on_device))
    errors = [output_error(weight, found.dequantize(), prepared) for found in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    # Where two codes are equally good the sums' last bits choose, and later columns make up for that one.
    assert (one.codes == other.codes).mean() > (0.99 if grid.bits > 2 else 0.97)
