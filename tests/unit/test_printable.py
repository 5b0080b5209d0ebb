"""What a stranger's file says reaches the terminal as text: an error is one line, and no escape is obeyed."""

from __future__ import annotations

import io
import json
import unicodedata
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from vera_edge import cli, printable
from vera_edge.cli import show
from vera_edge.errors import BundleWarning, VeraEdgeError

EVIL = "a\nvera-edge: all is well\r\x1b[2J\x07\x9b31m\u2028\u202ez\ud800"


@given(st.text())
def test_a_line_is_one_and_does_nothing(text: str) -> None:
    shown = printable.line(text)
    assert len(shown.splitlines()) <= 1
    assert not [mark for mark in shown if unicodedata.category(mark) in ("Cc", "Cs", "Zl", "Zp")]
    shown.encode()
    assert printable.lines("a\n\tb") == "a\n\tb"


def test_a_text_without_such_characters_stays_as_it_is() -> None:
    text = "Grüße, 模型 👩‍👩‍👧 “model\\name” [x]"
    assert printable.line(text) == printable.lines(text) == text


@pytest.mark.parametrize("error", [VeraEdgeError(EVIL), OSError(13, "no", EVIL), BundleWarning(EVIL)])
def test_an_error_is_printed_in_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fail() -> None:
        if isinstance(error, BundleWarning):
            warnings.warn(error, stacklevel=1)
        else:
            raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: fail)
    result = CliRunner().invoke(cli.main, ["verify"])
    assert result.exit_code == (0 if isinstance(error, BundleWarning) else 2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("vera-edge: ")
    assert printable.line(EVIL) in result.stderr


def test_a_real_file_cannot_break_the_line(tmp_path: Path) -> None:
    header = json.dumps({EVIL[:-1]: {"dtype": "\x1b[31m\n", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    result = CliRunner().invoke(
        cli.main, ["quantize", str(tmp_path), "-o", str(tmp_path / "out"), "--to", "nf4"]
    )
    assert result.exit_code == 2 and "\x1b" not in result.output
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("console", [show.out, show.err])
def test_cells_and_lines_show_control_characters(console: object) -> None:
    assert callable(console)
    made = console()
    made.file = io.StringIO()
    table = Table("name \x1b[2J", box=None)
    table.add_row(EVIL)
    made.print(table)
    made.print(f"note: {EVIL}")
    assert not set("\x1b\r\x07\x9b\u202e\ud800") & set(made.file.getvalue())
    assert "\\x1b[2J" in made.file.getvalue()
