"""The documentation is true: its links lead somewhere, its commands exist, and the README's recipes run.

In the README's recipes `model`, `adapter` and `text.txt` stand for the reader's own; here they are tiny ones.
`base` is what its `quantize` makes of `model`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import vera_edge
from scripts.bench_drift_table import MARKS, PAGE
from tests import tiny
from tests.conftest import Cli
from vera_edge import errors, merging
from vera_edge.cli import COMMANDS, main
from vera_edge.formats import blocks

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
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


DEMO = ROOT / "scripts" / "demo"
TO_TRY_NEXT = [
    Command(DEMO, tuple(shlex.split(line, comments=True)))
    for line in DEMO.read_text(encoding="utf-8").splitlines()
    if line.startswith("vera-edge ")
]
ALL_COMMANDS = [*TO_TRY_NEXT, *(command for page in PAGES for command in commands(page))]


def test_the_readme_shows_commands() -> None:
    assert {command.words[1] for command in commands(ROOT / "README.md")} >= {
        "inspect",
        "merge",
        "export",
        "drift",
        "run",
    }


def test_the_demo_ends_with_what_to_try_next() -> None:
    assert len(TO_TRY_NEXT) == 3
    assert DEMO.read_text(encoding="utf-8").rstrip().endswith("\nEND")


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


def test_the_device_part_is_what_the_readme_and_the_manual_say() -> None:
    """Every dependency of a plain `pip install vera-edge`, and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=~! ]", line)[0] for line in project["dependencies"]}
    known = needed | {re.split(r"[<>=~!; ]", line)[0] for line in project["optional-dependencies"]["build"]}
    for page, begin in (("README.md", "The device part brings"), ("docs/device.md", "is the device part:")):
        sentence = (ROOT / page).read_text(encoding="utf-8").split(begin)[1].split(".")[0]
        assert {word for word in re.findall(r"[\w-]+", sentence) if word in known} == needed, page


def test_the_architecture_lists_what_the_device_part_imports() -> None:
    imported = set[str]()
    for path in (ROOT / "vera_edge" / "device").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.partition(".")[0] for name in names}
    others = imported - sys.stdlib_module_names - {"vera_edge"}
    row = next(line for line in ARCHITECTURE.splitlines() if line.startswith("| `device/`"))
    said = row.rpartition(":")[2].partition(";")[0]
    assert set(re.findall(r"[a-z0-9_]+", said)) - {"and"} == others


def test_the_readme_lists_every_format_that_merge_writes(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `vera-edge merge"))
    listed = re.split(r",\s*", row.partition("folder:")[2].strip(" |"))
    with click.Context(main) as context:
        command = main.get_command(context, "merge")
    assert command is not None
    helped = next(option.help or "" for option in command.params if option.name == "to")
    assert re.split(r",\s*", helped.partition("stored: ")[2].rstrip(".")) == listed
    for name in listed:
        merging.prepare(tiny_llama.fp32, [(tiny_adapter, 1.0)], name)
    with pytest.raises(errors.VeraEdgeError, match="nf3"):
        merging.prepare(tiny_llama.fp32, [(tiny_adapter, 1.0)], "nf3")


def test_the_readme_lists_the_exit_codes() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {one.exit_code for one in classes if issubclass(one, errors.VeraEdgeError)}
    assert codes == {0, *raised}
    assert all(f"{code} " in (main.help or "") for code in codes)
    row = next(line for line in README.splitlines() if line.startswith("| 3 |"))
    for words in ("limit was broken", "can't be decided", "check failed", "rebuild differs"):
        assert words in row


def test_the_commands_that_the_readme_says_ask_for_a_signature_do() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `vera-edge sign"))
    named = re.findall(r"`(\w+)`", row.partition("a signature;")[2])
    assert len(named) > 3
    with click.Context(main) as context:
        for name in named:
            command = main.get_command(context, name)
            assert command is not None
            options = {word for option in command.params for word in option.opts}
            assert {"--trusted-keys", "--require-signature", "--allow-unsigned"} <= options, name


def test_the_manual_says_how_projections_are_blocked() -> None:
    text = " ".join((ROOT / "docs" / "export.md").read_text(encoding="utf-8").split())
    assert f"{blocks.BLOCK_OF_A} along the rows of A" in text
    lengths = [
        int(word) for word in re.findall(r"\d+", text.partition("longest of ")[2].partition(" that")[0])
    ]
    for rank in (8, 32, 48, 64, 128, 192, 256, 512):
        fits = [length for length in lengths if rank % length == 0]
        assert blocks.block_of_b(rank) == (max(fits) if fits else lengths[-1])


def test_a_transcript_says_what_verify_says() -> None:
    source = (ROOT / "vera_edge" / "cli" / "verify.py").read_text(encoding="utf-8")
    lines = re.findall(r"onnx_data_1: (.*)", (ROOT / "docs" / "device.md").read_text(encoding="utf-8"))
    assert lines and all(line in source for line in lines)


# What only some systems have, and is asked for with hasattr or getattr, or where its absence is caught.
POSIX = {"pread", "pwrite", "fork", "sched_setaffinity", "getuid", "chown", "statvfs", "mkfifo", "nice"}


def test_no_system_call_is_used_that_only_posix_has() -> None:
    """As the README says of other systems than Linux."""
    assert "Linux, x86-64" in README and "macOS and Windows" in README
    for path in (ROOT / "vera_edge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = node.value.id == "os" and node.attr in POSIX
                assert not used, f"{path}:{node.lineno}"


def test_the_recipes_run(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """Every `vera-edge` command of the README, in order, in one folder; exit 3 (a broken limit) is fine."""
    shutil.copytree(tiny_llama.bf16, tmp_path / "model")
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(tiny.TEXT * 30)
    monkeypatch.chdir(tmp_path)
    for command in commands(ROOT / "README.md"):
        done = cli(*command.words[1:])
        assert done.exit_code in (0, 3), f"{command}\n{done.output}"


# The folder that a page calls `base`; `model` is the float model, `adapter` was trained on the base.
BASES = {
    "from-qlora.md": "nf4",
    "from-gptq.md": "gptq",
    "to-raspberry-pi.md": "nf4",
    "to-phone.md": "nf4",
    "to-browser.md": "nf4",
    "release-refused.md": "nf4",
}
ELSEWHERE = ("python3 ", "rsync ")  # lines for another machine
RECIPE = """
[release]
name = "mine"
[[base]]
id = "base"
path = "base"
[[adapter]]
id = "v1"
base = "base"
path = "adapter"
[[variant]]
mode = "branch"
[limits]
data = "text.txt"
max_kl = 0.1
"""


@pytest.mark.parametrize("page", BASES)
def test_a_page_for_what_one_has_runs(
    page: str, tiny_llama: tiny.TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """Every `vera-edge` command of it, in order, in one folder; exit 3 (a broken limit) is fine."""
    shutil.copytree(tiny_llama.bf16, tmp_path / "model")
    shutil.copytree(tiny_llama.nf4, tmp_path / "base")
    tiny.make_adapter(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(tiny.TEXT * 30)
    (tmp_path / "release.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    if BASES[page] == "gptq":
        blocks_of_32 = ("--to", "gptq", "--block-size", 32, "--method", "rtn")
        assert cli("merge", "base", "adapter", "-o", "gptq", *blocks_of_32).exit_code == 0
        shutil.rmtree("base")
        Path("gptq").rename("base")
    lines = [line for line in shell_lines(ROOT / "docs" / page) if not line.startswith(ELSEWHERE)]
    assert lines
    for line in lines:
        words, _, file = line.partition(" > ")
        program, *rest = shlex.split(words)
        assert program == "vera-edge", line
        done = cli(*rest)
        assert done.exit_code in (0, 3), f"{line}\n{done.output}"
        if file:
            Path(file).write_text(done.stdout)


def test_the_site_builds_strictly_and_shows_every_page(tmp_path: Path) -> None:
    """No link into nothing, no page left out of the navigation."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet would let warnings pass
    build += ["--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert made == {path.stem for path in (ROOT / "docs").glob("*.md")}
