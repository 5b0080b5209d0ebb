"""The operations that bench_scale counts are those that torch and numpy are seen to be given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import bench_scale_flops
from scripts.bench_models import SIZES, Size
from vera_edge.reference.calibration import LayerInputs, Walk, follow_target
from vera_edge.reference.layers import Changed
from vera_edge.requantize import Effort, Gram, gptq, int_blocks, requantize
from vera_edge.requantize import gram as grams
from vera_edge.text.windows import WINDOW

SIZE = Size(512, 1024, 1, 4, 2, 100)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
IN_PLACE = torch.ops.aten.addmm_


class Counting(np.ndarray[Any, Any]):
    """A matrix that counts the operations of the products that it, its parts and copies go into."""

    done: ClassVar[list[int]] = []  # by any of them

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: Any, *inputs: Any, out: tuple[Any, ...] = (), **kwargs: Any
    ) -> Any:
        if ufunc is np.matmul:
            first, second = (np.shape(one) for one in inputs)
            self.done.append(2 * int(np.prod(first)) * second[-1])
        if out:
            kwargs["out"] = tuple(map(_plain, out))
        found = getattr(ufunc, method)(*map(_plain, inputs), **kwargs)
        return out[0] if out else found


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Counting) else value


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products, of shapes (1, heads, tokens, width)."""
    return 2 * 2 * int(np.prod(query)) * int(key[-2])


def _added(total: Any, one: Any, other: Any, *_: Any, **__: Any) -> int:
    return 2 * int(np.prod(one)) * int(other[-1])


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        hidden_size=SIZE.hidden,
        intermediate_size=SIZE.inner,
        num_hidden_layers=1,
        num_attention_heads=SIZE.heads,
        num_key_value_heads=SIZE.kv_heads,
        vocab_size=SIZE.vocabulary,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def walked(model: Any, windows: int) -> tuple[dict[Any, int], list[LayerInputs]]:
    """What torch counts, by operation, while so many windows go through the model; all statistics."""
    found: list[LayerInputs] = []
    modules = frozenset(f"model.layers.0.{name}" for name in SIZE.shapes())
    texts = [np.random.default_rng(seed).integers(0, SIZE.vocabulary, WINDOW) for seed in range(windows)]

    def answer(inputs: LayerInputs) -> Mapping[str, Changed]:
        found.append(inputs)
        return {name: Changed(model.get_submodule(name).weight.data * 0.9) for name in inputs.modules}

    counts: dict[Any, Any] = {ATTENTION: _attention, IN_PLACE: _added}
    with FlopCounterMode(display=False, custom_mapping=counts) as counted:
        Walk(model, modules, texts, "inputs").run(answer)
    return counted.get_flop_counts()["Global"], found


@pytest.fixture(scope="module")
def many(model: Any) -> tuple[dict[Any, int], list[LayerInputs]]:
    return walked(model, 4)


def test_of_passes_and_statistics(model: Any, many: tuple[dict[Any, int], list[LayerInputs]]) -> None:
    # What the layer is looked at with beforehand doesn't depend on how many windows there are.
    few = walked(model, 2)[0]
    done = {operation: count - few[operation] for operation, count in many[0].items()}
    tokens = 2 * WINDOW
    needed = bench_scale_flops.calibrated_export(SIZE, Effort(tokens=tokens))
    # torch counts the masked half of attention as well; of symmetric products 10 of 16 blocks are computed.
    masked = done[ATTENTION] / 2
    beside = tokens * (3 * SIZE.hidden**2 + SIZE.inner**2) / 4
    assert masked == 2 * 2 * tokens * WINDOW * SIZE.hidden
    assert sum(done.values()) == needed["forward"] + masked + needed["gram"] + beside


@pytest.fixture
def products() -> Iterator[list[int]]:
    Counting.done.clear()
    yield Counting.done
    Counting.done.clear()


@pytest.mark.parametrize("name", ["quick", "default", "thorough"])
def test_of_factors_targets_and_rounding(
    model: Any,
    many: tuple[dict[Any, int], list[LayerInputs]],
    products: list[int],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whole blocks on a diagonal are worked on: the smaller they are, the less of that isn't needed.
    for module, constant in ((grams, "_BLOCK"), (gptq, "_PANEL")):
        monkeypatch.setattr(module, constant, 32)
    effort, grid = Effort.named(name), int_blocks(4, 32, symmetric=False)
    targets, rounding = 0, 0
    for inputs in many[1]:
        gram = Gram.of(inputs.gram, inputs.damp)
        gram = replace(gram, values=gram.values.view(Counting))
        moved = None if inputs.moved is None else inputs.moved.view(Counting)
        for linear in inputs.modules:
            weight = model.get_submodule(linear).weight.data.numpy()
            products.clear()
            target = follow_target(weight, replace(inputs, moved=moved), 1.0, gram)
            targets += sum(products)
            products.clear()
            requantize(target, grid, "gptq", gram, effort)
            rounding += sum(products)
    needed = bench_scale_flops.calibrated_export(SIZE, effort)
    assert targets == pytest.approx(needed["factors"], rel=0.05)
    assert rounding == pytest.approx(needed["rounding"], rel=0.01)


def test_of_a_billion_weights() -> None:
    """By hand: 16 layers of 60.8 million weights, 2048 and 8192 wide, and 16,384 tokens."""
    parts = bench_scale_flops.calibrated_export(SIZES["1.2b"], Effort())
    whole, narrow, tokens = 16 * 60.8e6, 16 * 2048**2, 16_384
    assert parts["forward"] == pytest.approx(4 * tokens * whole + 16 * 4 * tokens * 256 * 2048, rel=1e-3)
    # Three inputs of 2048 and one of 8192; two have several linears; o_proj and down_proj.
    assert parts["gram"] == pytest.approx(tokens * narrow * (3 + 16 + 2 * 2 + 4 * (1 + 4)), rel=1e-3)
    assert sum(parts.values()) == pytest.approx(176e12, rel=0.01)
