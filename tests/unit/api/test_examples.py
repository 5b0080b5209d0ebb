"""The examples in the docstrings of the public interface, run as they stand on tiny models."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest

import vera_edge
from tests import tiny, tiny_encoder
from tests.unit.bundle.test_signing import make_key
from vera_edge import training

RECIPE = """
[release]
name = "tiny"
[[base]]
id = "tiny"
path = "base"
licence = "Apache-2.0"
[[adapter]]
id = "a"
base = "tiny"
path = "adapter"
[[variant]]
target = "onnx"
mode = "branch"
weights = "fp32"
[limits]
data = "text.txt"
max_kl = 0.05
"""


def examples() -> list[tuple[str, doctest.DocTest]]:
    """Every public name that has an example, and the example."""
    parser = doctest.DocTestParser()
    found = []
    public = {name: getattr(vera_edge, name) for name in vera_edge.__all__}
    for name, thing in (public | {"load": training.load}).items():
        text = thing.__doc__ or ""
        test = parser.get_doctest(text, {"vera_edge": vera_edge}, name, None, None)
        if test.examples:
            found.append((name, test))
    return found


@pytest.fixture(scope="module")
def table(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("table")
    shutil.copytree(tiny_llama.fp32, folder / "model")
    shutil.copytree(tiny_llama.nf4, folder / "base")
    vera_edge.quantize(folder / "model", out=folder / "integers", to="gptq", method="rtn")
    tiny.make_adapter(folder / "base", folder / "adapter")
    vera_edge.export(
        folder / "base", folder / "adapter", out=folder / "bundle", mode="branch", weights="fp32"
    )
    vera_edge.golden(folder / "bundle", folder / "base", folder / "adapter", max_kl=0.1)
    shutil.copytree(folder / "bundle", folder / "newer")
    vera_edge.golden(folder / "newer", folder / "base", folder / "adapter", max_kl=0.05)
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, folder / "encoder")
    vera_edge.export(base, adapter, out=folder / "embedder", weights="fp32")
    make_key(folder, "publisher")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "text.txt").write_text(tiny.TEXT * 8)
    return folder


@pytest.mark.parametrize("test", [pytest.param(test, id=name) for name, test in examples()])
def test_an_example_does_what_it_says(
    test: doctest.DocTest, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(table, tmp_path / "table"))
    said: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    assert outcome.attempted and not outcome.failed, "".join(said)


def test_every_function_has_one() -> None:
    named = {name for name, _ in examples()}
    callables = {name for name in vera_edge.__all__ if name.islower()}
    assert callables | {"Encoder", "Session"} <= named
