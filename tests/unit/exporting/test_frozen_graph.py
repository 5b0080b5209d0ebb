"""A graph with an adapter built in gives what the adapter gives, beside the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests import exported, tiny
from tests.conftest import Cli
from vera_edge.bundle import contents as bundle
from vera_edge.exporting import target

SIZE = 700_000  # bytes of a graph and vectors, at most: the weights aren't in it


@pytest.fixture
def branch(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> Path:
    out = tmp_path / "branch"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="nf4")
    return out


def test_it_gives_what_the_adapter_gives(branch: Path, cli: Cli) -> None:
    result = cli("adapter", "freeze", "default", "--for", branch, "--name", "law")
    assert result.exit_code == 0, result.stderr
    ids, path = exported.tokens(), branch / "onnx" / "model_law.onnx"
    truth = exported.logits(branch, ids, branch / "adapters" / "default.onnx_adapter")
    assert not np.array_equal(truth, exported.logits(branch, ids))
    session = ort.InferenceSession(str(path))
    found = session.run(["logits"], exported.decoder_feeds(session, ids))[0][0]
    np.testing.assert_allclose(found, truth, atol=1e-5 * np.abs(truth).max())
    assert not any("lambda" in port.name for port in session.get_overridable_initializers())
    assert path.stat().st_size < SIZE
    assert "onnx/model_law.onnx" in bundle.verify(branch).files


def test_the_same_again_and_under_another_name(branch: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "other.onnx_adapter"
    shutil.copy(branch / "adapters" / "default.onnx_adapter", file)
    assert cli("adapter", "freeze", file, "--for", branch).exit_code == 0
    written = (branch / "onnx" / "model_other.onnx").read_bytes()
    again = cli("adapter", "freeze", file, "--for", branch)
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert cli("adapter", "freeze", file, "--for", branch, "--force").exit_code == 0
    assert (branch / "onnx" / "model_other.onnx").read_bytes() == written
    bundle.verify(branch)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nobody",), "has no adapter named 'nobody'"),
        (("missing.onnx_adapter",), "missing"),
        (("default", "--name", "../x"), "isn't a plain name"),
    ],
)
def test_refusals_leave_the_bundle_as_it_was(
    branch: Path, cli: Cli, words: tuple[str, ...], said: str
) -> None:
    before = sorted(path.name for path in branch.rglob("*"))
    result = cli("adapter", "freeze", *words, "--for", branch)
    assert result.exit_code == 2 and said in result.stderr
    assert sorted(path.name for path in branch.rglob("*")) == before
    bundle.verify(branch)


def test_a_signed_or_a_merged_bundle_is_refused(
    branch: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
) -> None:
    (branch / bundle.SIGNATURE).write_text("{}")
    assert "freeze first, then sign" in cli("adapter", "freeze", "default", "--for", branch).stderr
    merged = tmp_path / "merged"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], merged, weights="int8")
    result = cli("adapter", "freeze", "default", "--for", merged)
    assert result.exit_code == 2 and "has its adapter merged" in result.stderr
