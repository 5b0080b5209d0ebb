"""What an error says is one line that a terminal can show, whatever names a file brought into it."""

from __future__ import annotations

import pickle

import pytest

from vera_edge.errors import CheckpointError, VeraEdgeError


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\ud800", r"\ud800"),
        ("a\u2028b", r"a\u2028b"),
        ("é 🙂 C:\\x", "é 🙂 C:\\x"),
    ],
)
def test_a_name_of_a_file_stays_in_its_line(name: str, shown: str) -> None:
    assert str(CheckpointError(f"tensor {name} is missing")) == f"tensor {shown} is missing"


def test_a_long_name_is_cut_in_the_middle() -> None:
    said = str(VeraEdgeError("tensor " + "a" * 100_000 + " is missing; copy it again"))
    assert len(said) < 2100
    assert said.startswith("tensor aaa")
    assert said.endswith("aaa is missing; copy it again")


def test_it_comes_whole_out_of_another_process() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("one")))
    assert (type(error), str(error)) == (CheckpointError, "one")
