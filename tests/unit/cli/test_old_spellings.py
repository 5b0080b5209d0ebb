"""Options under the names of earlier versions go on working, and say what they are called now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import Cli
from vera_edge.cli import COMMANDS, main
from vera_edge.cli.old_spellings import _RENAMED, respelled


def test_words_are_respelled_and_noted_once() -> None:
    words = ["a", "--output", "out", "--projections=seed", "--output", "b", "--", "--output"]
    today, notes = respelled(words)
    assert today == ["a", "--out", "out", "--projections-from=seed", "--out", "b", "--", "--output"]
    assert notes == [
        "--output is called --out now; write that",
        "--projections is called --projections-from now; write that",
    ]
    assert respelled(["run", "-o", "x", "projections"]) == (["run", "-o", "x", "projections"], [])


def test_no_command_has_an_option_of_an_old_name() -> None:
    import click

    def options(command: click.Command) -> set[str]:
        own = {name for parameter in command.params for name in parameter.opts}
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        return own.union(*map(options, inner))

    context = click.Context(main)
    every = set[str]()
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        every |= options(command)
    assert not every & set(_RENAMED)
    assert every >= set(_RENAMED.values())


@pytest.mark.parametrize("old", [True, False])
def test_an_export_by_either_spelling(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, old: bool
) -> None:
    words = ["--mode", "branch", "--weights", "nf4"]
    words += ["--projections", "seed"] if old else ["--projections-from", "seed"]
    result = cli("export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    assert ("--projections is called --projections-from now" in result.stderr) is old
    assert "generated" in (tmp_path / "out" / "vera_edge.json").read_text()
