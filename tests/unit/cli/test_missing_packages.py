"""On a device-only install a command that needs more says which package, and which extra brings it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny_bundle import TinyBundles
from vera_edge.cli import COMMANDS, EXTRAS

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Runs each command where none of the packages of the extras can be imported.
HIDDEN = """
import importlib.abc, json, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
hidden = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Hide())
from click.testing import CliRunner
from vera_edge.cli import main
told = []
for words in json.loads(sys.argv[2]):
    result = CliRunner().invoke(main, words)
    told.append([result.exit_code, result.stderr, repr(result.exception)])
print(json.dumps(told))
"""


def run(lines: list[list[object]]) -> list[tuple[int, str, str]]:
    words = json.dumps([[str(word) for word in line] for line in lines])
    command = [sys.executable, "-c", HIDDEN, json.dumps(sorted(EXTRAS)), words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [(code, said, error) for code, said, error in json.loads(done.stdout)]


def test_the_command_and_the_extra_are_named(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    out, bundle, base = tmp_path / "out", tiny_bundles.branch, tiny_llama.nf4
    (tmp_path / "recipe.toml").write_text("name = 'x'\n")
    (tmp_path / "text.txt").write_text(tiny.TEXT * 8)
    lines: dict[str, tuple[list[object], str]] = {
        "quantize": ([tiny_llama.fp32, "-o", out, "--to", "nf4"], "build"),
        "plan": ([base, tiny_adapter, "-o", out, "--max-size", "1MB"], "build"),
        "merge": ([base, tiny_adapter, "-o", out, "--to", "fp32"], "build"),
        "export": ([base, tiny_adapter, "-o", out, "--for", "pi5-4gb"], "build"),
        "drift": ([tiny_adapter, base, "--base", base, "--data", tmp_path / "text.txt"], "build"),
        "release": ([tmp_path / "recipe.toml", "-o", out], "release"),
        "serve": ([bundle, "--port", "0"], "serve"),
    }
    told = run([[name, *words] for name, (words, _) in lines.items()])
    for (name, (_, extra)), (code, said, error) in zip(lines.items(), told, strict=True):
        assert code == 2, (name, said, error)
        assert said.startswith(f"vera-edge: {name} needs the package "), said
        assert said.endswith(f"which isn't installed: pip install 'vera-edge[{extra}]'\n"), said
        assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "text.txt"]


def test_every_command_explains_itself_without_the_extras() -> None:
    for name, (code, said, error) in zip(COMMANDS, run([[name, "--help"] for name in COMMANDS]), strict=True):
        assert code == 0 and not said, (name, said, error)


def imported() -> set[str]:
    """What the packages import, anywhere in them, that neither Python nor the repository has."""
    found = set[str]()
    for path in (path for root in ("vera_edge", "exporters") for path in (ROOT / root).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return {name for name in found - sys.stdlib_module_names if not name.startswith("vera_edge")}


def test_every_package_beyond_the_device_part_is_known_by_its_extra() -> None:
    device = {"click", "jinja2", "numpy", "onnxruntime", "rich", "safetensors", "tokenizers"}
    with_them = {"markupsafe", "huggingface_hub"}  # jinja2 and tokenizers bring these
    assert imported() - device - with_them <= set(EXTRAS)


OTHER_NAMES = {"cyclonedx": "cyclonedx-python-lib", "llama_cpp": "llama-cpp-python"}
BROUGHT = {"h11": "uvicorn", "sigstore": "model-signing"}  # by another package of the extra


@pytest.mark.parametrize("package", sorted(EXTRAS))
def test_an_extra_brings_what_it_is_said_to(package: str) -> None:
    name = BROUGHT.get(package) or OTHER_NAMES.get(package) or package.replace("_", "-")
    listed = {line.split(">=")[0] for line in PROJECT["optional-dependencies"][EXTRAS[package]]}
    assert name in listed
