"""A GGUF folder as a bundle: golden vectors, adapters packed for it, updates; and validated in llama.cpp."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import vera_edge
from tests import tiny
from tests.conftest import Cli
from tests.unit.bundle.test_signing import make_key
from vera_edge.bundle import contents as bundle
from vera_edge.device.check import golden
from vera_edge.device.deploy.install import install, make_patch
from vera_edge.device.llama import runner
from vera_edge.errors import MismatchError, TargetError
from vera_edge.releasing.run import release

PROMPTS = "The adapter\nMerge the two in float32, then quantize again\n"
RECIPE = """
[release]
name = "tiny"
[[base]]
id = "tiny"
path = "nf4"
[[adapter]]
id = "a"
base = "tiny"
path = "a"
[[adapter]]
id = "b"
base = "tiny"
path = "b"
[[variant]]
target = "gguf"
mode = "branch"
weights = "q8_0"
head = "q8_0"
[limits]
data = "t.txt"
max_kl = 0.05
tokens = 512
window = 32
[sign]
key = "p.key"
public_key = "p.pem"
"""


@pytest.fixture(scope="module")
def inputs(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf-bundle")
    shutil.copytree(tiny_llama.nf4, folder / "nf4")
    tiny.make_adapter(tiny_llama.nf4, folder / "a")
    tiny.make_adapter(tiny_llama.nf4, folder / "b", vectors_seed=9)
    (folder / "t.txt").write_text(tiny.TEXT * 8)
    (folder / "prompts.txt").write_text(PROMPTS)
    make_key(folder, "p")
    (folder / "r.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def branch(inputs: Path) -> Path:
    """A branch with both adapters and golden vectors of each."""
    base, out = inputs / "nf4", inputs / "branch"
    adapters = [inputs / "a", inputs / "b"]
    vera_edge.export(base, adapters, out=out, target="gguf", mode="branch", weights="f32")
    vera_edge.golden(out, base, adapters, prompts=inputs / "prompts.txt", max_kl=1e-3, min_top1=0.95)
    return out


def test_golden_vectors_end_where_the_file_ends_a_text(branch: Path) -> None:
    manifest = bundle.verify(branch)
    assert manifest.golden == golden.FILE and manifest.limits == {"max_kl": 1e-3, "min_top1": 0.95}
    cases = golden.read(branch / golden.FILE, tiny.VOCABULARY).cases
    assert [case.adapter for case in cases] == [None, None, "default", "default", "b", "b"]
    end = gguf.GGUFReader(branch / "model.gguf").fields["tokenizer.ggml.eos_token_id"].contents()
    for case in cases:
        assert end not in case.continuation[:-1]


def test_without_llama_cpp_python_a_sentence_says_what_brings_it(
    branch: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    runner.library.cache_clear()
    with pytest.raises(TargetError, match=r"isn't installed; .*pip install 'vera-edge\[llama\]'"):
        vera_edge.validate(branch)
    result = cli("validate", branch)
    assert result.exit_code == 2 and "pip install" in result.stderr
    runner.library.cache_clear()


def test_an_adapter_packed_for_a_bundle_is_the_one_that_an_export_writes(
    branch: Path, inputs: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "b.gguf"
    result = cli("adapter", "pack", inputs / "b", "--for", branch, "-o", out, "--base", inputs / "nf4")
    assert result.exit_code == 0, result.stderr
    assert out.read_bytes() == (branch / "adapters" / "b.gguf").read_bytes()
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(MismatchError, match="give --base"):
        vera_edge.pack_adapter(inputs / "b", branch, out=tmp_path / "c.gguf")
    with pytest.raises(MismatchError, match="made of another base"):
        vera_edge.pack_adapter(inputs / "b", branch, out=tmp_path / "c.gguf", base=tiny_llama.fp32)


def test_a_device_that_has_the_base_gets_the_adapter_alone(inputs: Path, tmp_path: Path) -> None:
    made = [
        vera_edge.export(
            inputs / "nf4", inputs / name, out=tmp_path / name, target="gguf", mode="branch", weights="q8_0"
        )
        for name in "ab"
    ]
    install(made[0].folder, tmp_path / "device")
    size = make_patch(made[0].folder, made[1].folder, tmp_path / "patch")
    assert size == made[1].adapters["default"].stat().st_size
    done = install(tmp_path / "patch", tmp_path / "device", partial=True)
    assert done.digest == bundle.read(made[1].folder).digest
    found = vera_edge.diff(made[0].folder, made[1].folder)
    assert set(found.files) == {"adapters/default.gguf"}


def test_a_branch_validates_in_llama_cpp_for_every_adapter(branch: Path) -> None:
    pytest.importorskip("llama_cpp")
    result = vera_edge.validate(branch, threads=1)
    assert result.passed, result.checks
    assert [drift.adapter for drift in result.drift] == [None, "default", "b"]
    assert all(drift.greedy > 0.9 and drift.step_kl < 1e-3 for drift in result.drift)
    assert {"files", "determinism", "swap", "leaks", "drift (b)"} <= {check.name for check in result.checks}
    assert result.device["threads"] == 1 and result.device["tools"]["llama-cpp-python"]


def test_the_wrong_adapter_in_a_gguf_bundle_is_caught(branch: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder = shutil.copytree(branch, tmp_path / "b")
    shutil.copyfile(folder / "adapters" / "default.gguf", folder / "adapters" / "b.gguf")
    manifest = bundle.read(folder)
    bundle.write(folder, bundle.change(manifest))
    failed = {check.name for check in vera_edge.validate(folder).checks if not check.passed}
    assert failed == {"drift (b)"}


def test_a_release_is_measured_signed_and_shares_its_base(inputs: Path) -> None:
    pytest.importorskip("llama_cpp")
    made = release(inputs / "r.toml", inputs / "out", store=inputs / "store")
    assert [result.state for result in made.results] == ["built", "built"], [
        result.message for result in made.results
    ]
    folders = [inputs / "out" / name / "gguf-branch-q8_0" for name in "ab"]
    for folder in folders:
        manifest = vera_edge.verify(folder, trusted_keys=inputs / "p.pem", require_signature=True)
        assert manifest.golden and "llama-server -m model.gguf" in (folder / "README.md").read_text()
        assert vera_edge.validate(folder).passed
    assert folders[0].joinpath("model.gguf").samefile(folders[1] / "model.gguf")
    for name, folder in zip("ab", folders, strict=True):
        direct = vera_edge.export(
            inputs / "nf4",
            inputs / name,
            out=inputs / f"direct-{name}",
            target="gguf",
            mode="branch",
            weights="q8_0",
            head="q8_0",
        )
        for file in ("model.gguf", "adapters/default.gguf"):
            assert (folder / file).read_bytes() == (direct.folder / file).read_bytes(), file
    again = release(inputs / "r.toml", inputs / "out", store=inputs / "store")
    assert [result.state for result in again.results] == ["unchanged", "unchanged"]


def test_a_release_without_llama_cpp_python_fails_in_that_sentence(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    runner.library.cache_clear()
    made = release(inputs / "r.toml", tmp_path / "out", store=tmp_path / "store")
    assert {result.state for result in made.results} == {"failed"}
    assert all("pip install 'vera-edge[llama]'" in result.message for result in made.results)
    runner.library.cache_clear()


def test_logits_of_parts_are_those_of_the_whole(branch: Path) -> None:
    pytest.importorskip("llama_cpp")
    opened = runner.LlamaRunner(branch / "model.gguf", threads=1)
    tokens = np.random.default_rng(3).integers(3, tiny.VOCABULARY, 40)
    whole = opened.logits(tokens)
    found = np.concatenate([rows.copy() for _, rows in opened.parts(tokens, 30)])
    assert np.abs(found - whole).max() < 1e-2 * np.abs(whole).max()
    chosen = opened.greedy(tokens, 5)
    for token in chosen:
        assert token == int(opened.logits(tokens)[-1].argmax())
        tokens = np.append(tokens, token)
