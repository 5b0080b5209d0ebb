"""Rows that join and leave a batch, against each of them alone in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tiny_bundle import TinyBundles
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.rows import Rows, bytes_per_token, takes_rows
from vera_edge.device.runtime.session import Session

DRAW = np.random.default_rng(0)
PROMPTS = [DRAW.integers(3, 300, count) for count in (5, 17, 40, 3, 9)]
FED = [DRAW.integers(3, 300, 12).tolist() for _ in PROMPTS]


def run(
    session: Session, numbers: list[int], adapters: list[str | None], plan: list[str]
) -> dict[int, list[np.ndarray]]:
    """Logits of each row at each of its steps. plan: "+i" lets row i join, "-i" leave, "." is a step."""
    decoder = session.decoder
    rows = Rows(decoder, 96, 5)
    inside: list[int] = []
    found: dict[int, list[np.ndarray]] = {number: [] for number in numbers}
    vectors = [session.vectors_of(adapter) for adapter in adapters]
    for word in plan:
        if word == ".":
            logits = rows.feed([FED[number][len(found[number])] for number in inside])
            for number, row in zip(inside, logits, strict=True):
                found[number].append(row.copy())
        elif word[0] == "+":
            number = int(word[1:])
            cache = decoder.cache(len(PROMPTS[number]))
            Steps(decoder, cache, vectors[number]).prefill(PROMPTS[number])
            rows.join(cache, len(PROMPTS[number]), vectors[number])
            inside.append(number)
        else:
            place = inside.index(int(word[1:]))
            rows.leave(place)
            inside[place] = inside[-1]
            del inside[-1]
        assert len(rows) == len(inside)
    return found


@pytest.mark.parametrize("name", ["rows", "int4"])
def test_a_row_has_the_logits_that_it_has_alone(tiny_bundles: TinyBundles, name: str) -> None:
    """To the last bit, int4 products included, whatever joins and leaves beside it."""
    session = Session.open(getattr(tiny_bundles, name), threads=1)
    adapters: list[str | None] = ["first", "second", None, "first", "second"]
    if name == "int4":
        adapters = ["default"] * 5
    plan = ["+0", ".", "+1", ".", ".", "+2", ".", "+3", "+4", ".", "-1", ".", "-0", ".", "-4", ".", "."]
    together = run(session, list(range(5)), adapters, plan)
    for number in range(5):
        steps = len(together[number])
        alone = run(session, [number], adapters, [f"+{number}", *["."] * steps])[number]
        assert steps > 1
        for one, other in zip(together[number], alone, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_row_has_the_logits_of_the_whole_text_at_once(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.rows, "second", threads=1)
    plan = ["+0", "+1", ".", ".", "-0", ".", "."]
    found = run(session, [0, 1], ["first", "second"], plan)[1]
    expected = session.logits(np.array([*PROMPTS[1], *FED[1][:4]], np.int64))[-4:]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_which_graphs_take_an_adapter_for_each_row(tiny_bundles: TinyBundles) -> None:
    taken = {
        name: takes_rows(Session.open(getattr(tiny_bundles, name)).decoder)
        for name in ("rows", "branch", "fp32")
    }
    assert taken == {"rows": True, "branch": False, "fp32": True}


def test_the_bytes_of_a_token_are_those_of_the_cache(tiny_bundles: TinyBundles) -> None:
    decoder = Session.open(tiny_bundles.fp32).decoder
    assert bytes_per_token(decoder) * 7 == sum(array.nbytes for array in decoder.cache(7))
