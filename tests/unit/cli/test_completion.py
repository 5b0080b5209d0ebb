"""Completion in a shell: the scripts are what the shells read, and what they ask is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli


def complete(shell: str, *words: str) -> list[str]:
    """What is offered for the last of `words`, asked as the script of a shell does."""
    environment = {"_VERA_EDGE_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(["vera-edge", *words])}
    environment["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words))
    command = [sys.executable, "-c", "from vera_edge.cli import main; main(prog_name='vera-edge')"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_asks_the_command_by_the_variable_that_it_answers_to(shell: str, cli: Cli) -> None:
    made = cli("completion", shell)
    assert made.exit_code == 0, made.output
    assert f"_VERA_EDGE_COMPLETE={shell}_complete" in made.stdout and "vera-edge" in made.stdout
    if (program := shutil.which(shell)) is not None:
        read = subprocess.run([program, "-n"], input=made.stdout, capture_output=True, text=True, check=False)
        assert read.returncode == 0, read.stderr


def test_commands_options_and_choices_are_offered() -> None:
    assert "plain,export" in complete("bash", "exp")
    assert "plain,--weights" in complete("bash", "export", "--wei")
    assert "plain,branch" in complete("bash", "export", "--mode", "")
    assert "plain,freeze" in complete("bash", "adapter", "fr")
    assert "plain,fish" in complete("bash", "completion", "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_by_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(cli("completion", "bash").stdout)
    (tmp_path / "vera-edge").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c "
        "\"from vera_edge.cli import main; main(prog_name='vera-edge')\"\n"
    )
    (tmp_path / "vera-edge").chmod(0o755)
    ask = (
        f"PATH={tmp_path}:$PATH; source {tmp_path}/script; COMP_WORDS=(vera-edge qua); COMP_CWORD=1; "
        "_vera_edge_completion vera-edge; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["quantize"], done.stderr


def test_another_shell_is_refused(cli: Cli) -> None:
    refused = cli("completion", "tcsh")
    assert refused.exit_code == 2 and "bash" in refused.stderr
