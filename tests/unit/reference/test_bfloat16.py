"""Computing in bfloat16 without the processor's help, against torch's own autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests import tiny
from vera_edge.arrays import Float64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.divergence import kl, log_softmax
from vera_edge.reference.bfloat16 import in_bfloat16
from vera_edge.reference.model import load_dense


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("shape", [(5, 64), (2, 9, 64)])
def test_products_are_autocasts_but_for_the_order_of_sums(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=draw) for size in (shape, (32, 64), (32,)))
    heads = torch.randn(1, 4, 11, 16, generator=draw)
    cases: list[Callable[[], torch.Tensor]] = [
        lambda: torch.nn.functional.linear(x, weight, bias),
        lambda: torch.nn.functional.linear(x, weight, bias=bias),
        lambda: x @ weight.T,
        lambda: torch.matmul(x, weight.T).float() + bias,
        lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    ]
    for case in cases:
        with _autocast():
            truth = case()
        with in_bfloat16(native=False):
            found = case()
        assert found.dtype == truth.dtype and not torch.equal(found.float(), case())
        # Equal sums may round to neighbours: 2^-8 of the value; attention rounds between its two products.
        torch.testing.assert_close(found, truth, rtol=2**-7, atol=2e-2)
        assert (found == truth).float().mean() > 0.5


def test_a_models_noise_is_that_of_autocast(tiny_llama: tiny.TinyLlama) -> None:
    model = load_dense(Checkpoint.open(tiny_llama.fp32)).eval()
    tokens = torch.arange(3, 90)[None] * 4 % tiny.VOCABULARY

    def run() -> Float64:
        with torch.inference_mode():
            return log_softmax(model(input_ids=tokens).logits[0].float().numpy())

    exact = run()
    with _autocast():
        truth = run()
    with in_bfloat16(native=False):
        found = run()
    noise = kl(exact, truth).mean()
    assert kl(exact, found).mean() == pytest.approx(noise, rel=0.3)
    # Two noises that had nothing in common would be twice as far from each other as each is from the truth.
    assert kl(truth, found).mean() < noise
