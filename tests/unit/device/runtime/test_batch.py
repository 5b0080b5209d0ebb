"""Several rows at once give what each gives alone, with an adapter of its own each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime.opened import AdapterChoice
from vera_edge.device.runtime.sampling import Sampling
from vera_edge.device.runtime.session import Session
from vera_edge.errors import DataError, MismatchError

PROMPTS = (
    "The adapter scales each row",
    "Merge",
    "A weight of the base layer keeps its bytes, and the side-branch",
)


def alone(session: Session, prompt: str, adapter: AdapterChoice, count: int = 24) -> tuple[str, list[int]]:
    session.swap(adapter)
    generation = session.generate(prompt, raw=True, max_tokens=count)
    return "".join(generation), generation.tokens


def together(
    session: Session, adapters: list[AdapterChoice] | None, count: int = 24
) -> tuple[list[str], list[list[int]]]:
    batch = session.generate_batch(PROMPTS, adapters, raw=True, max_tokens=count)
    texts = [""] * len(PROMPTS)
    for row, piece in batch:
        texts[row] += piece
    assert all(finish in ("end", "length") for finish in batch.finish)
    return texts, batch.tokens


def test_rows_give_what_each_gives_alone(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.branch)
    texts, tokens = together(session, None)
    for row, prompt in enumerate(PROMPTS):
        assert (texts[row], tokens[row]) == alone(session, prompt, "first")


def test_each_row_runs_its_own_adapter(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.rows)
    second = tiny_bundles.rows / "adapters" / "second.onnx_adapter"
    rows: list[list[AdapterChoice]] = [["first", second, None], [None, "first", "first"]]
    for adapters in rows:
        texts, tokens = together(session, adapters)
        for row, (prompt, adapter) in enumerate(zip(PROMPTS, adapters, strict=True)):
            assert (texts[row], tokens[row]) == alone(session, prompt, adapter)
    # The same prompt under three adapters is three texts: the rows really differ.
    batch = session.generate_batch([PROMPTS[0]] * 3, ["first", "second", None], raw=True, max_tokens=24)
    list(batch)
    assert len({tuple(row) for row in batch.tokens}) == 3


def test_rows_that_end_early_wait_for_the_others(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.fp32)
    _, reference = alone(session, PROMPTS[0], "default", 24)
    ends = session.decoder.ends | {reference[4]}
    object.__setattr__(session.decoder, "ends", ends)
    texts, tokens = together(session, None)
    assert len(tokens[0]) < 5 < max(map(len, tokens))
    for row, prompt in enumerate(PROMPTS):
        assert (texts[row], tokens[row]) == alone(session, prompt, "default")


def test_a_graph_without_a_batch_axis_says_so(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    session = Session.open(tiny_bundles.branch)
    with pytest.raises(MismatchError, match="takes one adapter for all rows"):
        session.generate_batch(PROMPTS, ["first", "second", None])
    with pytest.raises(DataError, match="2 adapters for 3 prompts"):
        session.generate_batch(PROMPTS, ["first", "second"])
    with pytest.raises(DataError):
        session.generate_batch([])
    with pytest.raises(DataError, match="prompts has 256 tokens"):
        session.generate_batch([np.full(256, 5)])


def test_a_seed_repeats_the_batch_and_rows_draw_apart(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.fp32)

    def draw(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, seed=seed)
        batch = session.generate_batch([PROMPTS[0]] * 2, sampling=sampling, raw=True, max_tokens=16)
        list(batch)
        return batch.tokens

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert first[0] != first[1]


def test_asyncio_gets_the_same_text_and_keeps_its_loop(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.branch)
    expected = [alone(session, prompt, "first")[0] for prompt in PROMPTS]
    ticks = 0

    async def collect(prompt: str) -> str:
        return "".join([piece async for piece in session.stream(prompt, raw=True, max_tokens=24)])

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def main() -> list[str]:
        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*(collect(prompt) for prompt in PROMPTS))
        ticking.cancel()
        return found

    assert asyncio.run(main()) == expected
    assert ticks > 24
