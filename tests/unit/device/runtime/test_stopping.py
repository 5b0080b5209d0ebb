"""Stop strings that are, or hold, special tokens, in every way of generating."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests import tiny_bundle
from tests.tiny_bundle import TinyBundles
from vera_edge.cli import main
from vera_edge.device.runtime.session import Session
from vera_edge.device.runtime.stopping import StopGate
from vera_edge.errors import DataError

PROMPT = "The adapter scales each row"
COUNT = 40


def with_special(source: Path, target: Path, names: Mapping[int, str], ends: list[int]) -> Path:
    """A copy of a bundle in which some tokens of the vocabulary are special ones of these names."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    old = {text: number for text, number in vocabulary.items() if number in names}
    for text, number in old.items():
        del vocabulary[text]
        vocabulary[names[number]] = number
        found["added_tokens"].append(_added(number, names[number]))

    def kept(merge: list[str]) -> bool:
        return old.keys().isdisjoint([*merge, "".join(merge)])

    found["model"]["merges"] = [merge for merge in found["model"]["merges"] if kept(merge)]
    path.write_text(json.dumps(found))
    config = target / "genai_config.json"
    settings = json.loads(config.read_text())
    settings["model"]["eos_token_id"] = ends
    config.write_text(json.dumps(settings))
    tiny_bundle.rewrite(target)
    return target


def _added(number: int, content: str) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content} | flags


class Spoken:
    """A bundle that says two special tokens, and what it says in full."""

    def __init__(self, bundles: TinyBundles, folder: Path) -> None:
        plain = Session.open(bundles.fp32)
        prompt = plain.text.tokens(PROMPT)
        generation = plain.generate(prompt, max_tokens=COUNT)
        list(generation)
        said = generation.tokens

        def fits(at: int) -> bool:
            """Said once, between whole characters: the tiny model says many that are none."""
            around = [plain.text.text([token]) for token in said[at - 1 : at + 2]]
            return said.count(said[at]) == 1 and not any("\ufffd" in text for text in around)

        first, second = [at for at in range(1, COUNT - 1) if fits(at)][:3:2]
        self.prompt, self.tokens, self.places = prompt, said, (first, second)
        self.names = {said[first]: "<|turn|>", said[second]: "<|stop|>"}
        self.folder = with_special(bundles.fp32, folder / "bundle", self.names, [2])
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def text(self, stop: int | None = None, special: bool = False) -> str:
        """The text of the first tokens, by the tokenizers package."""
        return self.tokenizer.decode(self.tokens[:stop], skip_special_tokens=not special)

    def before(self, stop: str) -> str:
        """The text before a stop string, looked for with special tokens written out."""
        written = self.text(special=True)
        shown = written[: written.index(stop)]
        for name in self.names.values():
            shown = shown.replace(name, "")
        return shown


@pytest.fixture(scope="module")
def spoken(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    return Spoken(tiny_bundles, tmp_path_factory.mktemp("spoken"))


WAYS = (
    "one special token",
    "the first of two",
    "text after a special token",
    "text before a special token",
    "text on both sides",
    "several special tokens and what is between",
)


def stop_string(spoken: Spoken, what: str) -> str:
    written = spoken.text(special=True)
    turn, stop = written.index("<|turn|>"), written.index("<|stop|>")
    return {
        "one special token": "<|stop|>",
        "the first of two": "<|turn|>",
        "text after a special token": written[stop : stop + 8 + 3],
        "text before a special token": written[stop - 3 : stop + 8],
        "text on both sides": written[turn - 2 : turn + 8 + 2],
        "several special tokens and what is between": written[turn : stop + 8],
    }[what]


@pytest.mark.parametrize("what", [*WAYS, "text alone, across a special token"])
def test_a_special_token_stops_the_text(spoken: Spoken, what: str) -> None:
    if what in WAYS:
        stop = stop_string(spoken, what)
        expected = spoken.before(stop)
    else:  # what a person reads is what they want to stop
        shown, at = spoken.text(), len(spoken.text(spoken.places[0]))
        stop = shown[at - 1 : at + 1]
        expected = shown[: shown.index(stop)]
    session = Session.open(spoken.folder)
    generation = session.generate(spoken.prompt, max_tokens=COUNT, stop=[stop, "never said"])
    pieces = list(generation)
    assert ("".join(pieces), generation.finish) == (expected, "stop") and all(pieces)
    assert len(generation.tokens) < COUNT
    alone = session.generate(spoken.prompt, max_tokens=COUNT, stop=stop)  # one string, not its characters
    assert ("".join(alone), alone.finish) == (expected, "stop")
    batch = session.generate_batch([spoken.prompt, spoken.prompt[:3]], max_tokens=COUNT, stop=[stop])
    assert "".join(piece for row, piece in batch if row == 0) == expected and batch.finish[0] == "stop"
    assert batch.tokens[0] == generation.tokens

    async def streamed() -> str:
        return "".join(
            [piece async for piece in session.stream(spoken.prompt, max_tokens=COUNT, stop=[stop])]
        )

    assert asyncio.run(streamed()) == expected


def test_the_command_stops_too(spoken: Spoken) -> None:
    words = ["run", str(spoken.folder), PROMPT, "--raw", "--json", "--max-tokens", str(COUNT)]
    shown = json.loads(CliRunner().invoke(main, [*words, "--stop", "<|stop|>"]).stdout)
    assert (shown["text"], shown["finish"]) == (spoken.before("<|stop|>"), "stop")


def test_without_a_stop_string_special_tokens_are_left_out(spoken: Spoken) -> None:
    session = Session.open(spoken.folder)
    generation = session.generate(spoken.prompt, max_tokens=COUNT, stop=["<|never|>"])
    assert ("".join(generation), generation.finish) == (spoken.text(), "length")


def test_a_stop_string_that_holds_the_models_own_end(spoken: Spoken, tmp_path: Path) -> None:
    """The end isn't shown in any case; of a stop string it completes nothing is shown either."""
    place = spoken.places[1]
    names = {spoken.tokens[place]: "<|stop|>"}
    folder = with_special(spoken.folder, tmp_path / "b", {}, [*names])
    session = Session.open(folder)
    whole = session.generate(spoken.prompt, max_tokens=COUNT)
    text = "".join(whole)
    assert (text, whole.finish) == (spoken.text(place), "end")
    for stop, expected in ((f"{text[-3:]}<|stop|>", text[:-3]), ("<|stop|>", text), (f"{text[-3:]}x", text)):
        generation = session.generate(spoken.prompt, max_tokens=COUNT, stop=[stop])
        assert ("".join(generation), generation.finish) == (expected, "end")
        batch = session.generate_batch([spoken.prompt], max_tokens=COUNT, stop=[stop])
        assert ("".join(piece for _, piece in batch), batch.finish) == (expected, ["end"])


def test_what_is_no_text_is_refused(spoken: Spoken) -> None:
    session = Session.open(spoken.folder)
    with pytest.raises(DataError, match="stop holds 5; give texts"):
        session.generate(PROMPT, stop=[5])  # type: ignore[list-item]


pieces = st.lists(st.tuples(st.text("ab<>", max_size=4), st.booleans()), max_size=12)


@given(pieces=pieces, stops=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3))
def test_the_gate_lets_through_what_comes_before_the_first_stop(
    pieces: list[tuple[str, bool]], stops: list[str]
) -> None:
    """Piece by piece as all at once, searched in the text shown and in the whole."""
    gate, shown = StopGate(stops), ""
    seen: list[tuple[str, bool]] = []
    expected = None
    for piece, visible in pieces:
        shown += gate.push(piece, visible)
        seen += [(character, visible) for character in piece]
        whole, text = "".join(c for c, _ in seen), "".join(c for c, v in seen if v)
        cuts = [text.index(stop) for stop in stops if stop in text]
        cuts += [sum(v for _, v in seen[: whole.index(stop)]) for stop in stops if stop in whole]
        if cuts:
            expected = text[: min(cuts)]
            break
    assert gate.closed == (expected is not None)
    assert shown + gate.flush() == ("".join(c for c, v in seen if v) if expected is None else expected)
