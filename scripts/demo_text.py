"""The demo's text: Python's own language reference, which every Python carries (`pydoc_data.topics`).

It is split by topic, so that held-out text comes from topics the adapter has never seen; a paragraph that the
reference repeats under several topics is taken out of the training text when a held-out topic has it.
Licence of all of it: Python Software Foundation License Version 2.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EVALUATION = ("string-methods", "comparisons", "import", "booleans")
CALIBRATION = ("assignment", "objects", "strings")
CODE = ("bisect", "heapq", "textwrap", "shlex", "statistics", "string")  # stdlib modules, for another domain
QUESTION = 'What does the Python reference say about "{title}"?'

README = """\
# Text of the demo

| File | What | Used for |
|---|---|---|
| train.txt | Python language reference, {train} topics | training the VeRA adapter |
| calibration.txt | the reference, topics {calibration} | whatever is fitted to data after training |
| eval.txt | the reference, topics {evaluation} | measuring; never trained or fitted on |
| code.txt | source of the standard library's {code} | measuring on another domain |

Source: Python {python} (`pydoc_data.topics` and the standard library).
Copyright Python Software Foundation; licensed under the PSF License Version 2
(https://docs.python.org/3/license.html). Paragraphs of held-out topics that other topics repeat are left out
of train.txt.
"""


@dataclass(frozen=True)
class Topic:
    """One page of the reference: its key, its first line, its text (rendered from reStructuredText)."""

    key: str
    title: str
    text: str

    @property
    def question(self) -> str:
        return QUESTION.format(title=self.title)


@dataclass(frozen=True)
class Split:
    """The topics by use, each group sorted by key."""

    train: tuple[Topic, ...]
    calibration: tuple[Topic, ...]
    evaluation: tuple[Topic, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it: from one Python to the next some pages differ."""
        topics = [
            (topic.key, topic.title, topic.text) for topic in self.train + self.calibration + self.evaluation
        ]
        return hashlib.sha256(repr(topics).encode()).hexdigest()


def split() -> Split:
    """This Python's reference, split by topic."""
    from pydoc_data.topics import topics

    missing = [key for key in EVALUATION + CALIBRATION if key not in topics]
    if missing:
        raise SystemExit(
            f"this Python's reference has no topic {', '.join(missing)}; use Python 3.11 to 3.14"
        )
    evaluation = [_topic(key, topics[key]) for key in EVALUATION]
    calibration = [_topic(key, _without(topics[key], evaluation)) for key in CALIBRATION]
    held_out = [*evaluation, *calibration]
    rest = sorted(set(topics) - set(EVALUATION) - set(CALIBRATION))
    train = {
        topic.text: topic for key in rest if (topic := _topic(key, _without(topics[key], held_out))).text
    }
    return Split(tuple(train.values()), tuple(calibration), tuple(evaluation))


def _topic(key: str, text: str) -> Topic:
    text = text.strip()
    return Topic(key, text.split("\n", 1)[0], text)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def _without(text: str, held_out: Iterable[Topic]) -> str:
    """`text` without the paragraphs that a held-out topic also has, whatever their indentation."""
    seen = {" ".join(part.split()) for topic in held_out for part in _paragraphs(topic.text)}
    return "\n\n".join(part for part in _paragraphs(text) if " ".join(part.split()) not in seen)


def write(folder: Path, python: str) -> None:
    """Write train, calibration, eval and code text with a README that says what they are."""
    parts = split()
    groups = {"train": parts.train, "calibration": parts.calibration, "eval": parts.evaluation}
    for name, topics in groups.items():
        ordered = list(topics)
        if name == "train":
            random.Random(0).shuffle(ordered)
        text = "\n\n\n".join(topic.text for topic in ordered) + "\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "code.txt").write_text(_code(), encoding="utf-8")
    readme = README.format(
        train=len(parts.train),
        calibration=", ".join(CALIBRATION),
        evaluation=", ".join(EVALUATION),
        code=", ".join(CODE),
        python=python,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _code() -> str:
    import importlib

    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE)
