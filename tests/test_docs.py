"""The documentation is true: its links lead somewhere, its commands exist, and the README's recipes run.

In the README's recipes `model`, `adapter` and `text.txt` stand for the reader's own; here they are tiny ones.
`base` is what its first recipe makes of `model`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import vera_edge
from scripts.bench_drift_table import MARKS, PAGE
from tests import tiny
from vera_edge.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Command:
    """One `vera-edge` line of a page."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {shlex.join(self.words)}"


def shell_lines(page: Path) -> Iterator[str]:
    """The logical lines of a page's `sh` blocks, without comments."""
    for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield line.strip()


def commands(page: Path) -> list[Command]:
    """The page's `vera-edge` commands; what a pipe or a redirection does with them is the shell's."""
    found = []
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[0] == "vera-edge":
            end = next(
                (i for i, word in enumerate(words) if word in ("|", "||", "&&", ">", ">>", ";")), len(words)
            )
            found.append(Command(page, tuple(words[:end])))
    return found


ALL_COMMANDS = [command for page in PAGES for command in commands(page)]


def test_the_readme_shows_commands() -> None:
    assert {command.words[1] for command in commands(ROOT / "README.md")} >= {
        "inspect",
        "merge",
        "export",
        "drift",
        "run",
    }


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_a_documented_command_exists_with_its_options(command: Command) -> None:
    """Parsed and type-checked by click as the command line would, without running it."""
    words = list(command.words[1:])
    group: click.Command = main
    with click.Context(main) as context:
        while isinstance(group, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0)
            found = group.get_command(context, name)
            assert found is not None, f"there is no command {name}"
            group = found
        if group is main:
            return
        try:
            group.make_context(group.name, words)
        except click.exceptions.Exit:
            pass  # --help and --version
        except click.UsageError as error:
            pytest.fail(f"{command}: {error.format_message()}")


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in COMMANDS if f"vera-edge {name}" not in text]
    assert not missing, f"no page says anything of {missing}"


def test_the_readme_shows_the_table_that_was_measured() -> None:
    before, after = MARKS
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split(before)[1].split(after)[0]
    measured = PAGE.read_text(encoding="utf-8").split("\n", 2)[2].split("\n## ")[0]
    assert shown.strip() == measured.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:|#", target):
            continue
        assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_imports_and_calls_what_there_is(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language != "python" or "import" not in block or ">>>" in block:
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vera_edge":
                for alias in node.names:
                    there = hasattr(importlib.import_module(str(node.module)), alias.name)
                    assert there or importlib.util.find_spec(f"{node.module}.{alias.name}"), alias.name
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vera_edge":
                assert node.attr in vera_edge.__all__, node.attr


def test_scripts_named_in_the_pages_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`(?:\./)?(scripts/[\w.]+)(?![\w.*])", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_recipes_run(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    """Every `vera-edge` command of the README, in order, in one folder; exit 3 (a broken limit) is fine."""
    shutil.copytree(tiny_llama.bf16, tmp_path / "model")
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(tiny.TEXT * 30)
    for command in commands(ROOT / "README.md"):
        run = subprocess.run(
            [sys.executable, "-m", *("vera_edge", *command.words[1:])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode in (0, 3), f"{command}\n{run.stdout}\n{run.stderr}"
