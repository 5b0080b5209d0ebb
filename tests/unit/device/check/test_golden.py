"""Golden vectors: made by torch, written, read back, and compared with the full divergence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.tiny_bundle import TinyBundles, TorchRunner
from vera_edge.device.check import golden
from vera_edge.device.runtime.chat import BundleText
from vera_edge.divergence import log_softmax
from vera_edge.errors import BundleError, DataError
from vera_edge.measuring import metrics

PROMPTS = ("The adapter", "Merge the two in float32")


@pytest.fixture(scope="module")
def made(tiny_bundles: TinyBundles) -> golden.Golden:
    runner = TorchRunner(tiny.load(tiny_bundles.base))
    return golden.make(
        {None: runner}, BundleText(tiny_bundles.base), "torch", PROMPTS, frozenset({2}), new_tokens=6, k=20
    )


def test_cases_hold_what_torch_says(made: golden.Golden, tiny_bundles: TinyBundles) -> None:
    import torch

    model = tiny.load(tiny_bundles.base).eval()
    text = BundleText(tiny_bundles.base)
    for case, prompt in zip(made.cases, PROMPTS, strict=True):
        assert case.tokens[: case.prompt].tolist() == text.prompt(prompt).tolist()
        ids = torch.tensor(case.tokens[: case.prompt])[None]
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert case.continuation == out[0, case.prompt :].tolist()
        with torch.no_grad():
            expected = model(torch.tensor(case.tokens)[None]).logits[0].double().log_softmax(-1).topk(20)
        np.testing.assert_array_equal(case.ids[:, 0], expected.indices[:, 0].numpy())
        np.testing.assert_allclose(case.log_p, expected.values.numpy(), atol=1e-6)


def _file(folder: Path, made: golden.Golden) -> Path:
    path = folder / golden.FILE
    path.write_bytes(golden.to_bytes(made))
    return path


def test_it_reads_back_to_five_decimals(made: golden.Golden, tmp_path: Path) -> None:
    found = golden.read(_file(tmp_path, made), tiny.VOCABULARY)
    assert found.reference == "torch" and len(found.cases) == len(PROMPTS)
    for ours, theirs in zip(found.cases, made.cases, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.log_p, theirs.log_p, atol=5.1e-6)
        assert (ours.adapter, ours.prompt) == (theirs.adapter, theirs.prompt)


def case_of(logits: np.ndarray, k: int) -> golden.Case:
    log_p = log_softmax(logits)
    ids = np.argsort(-log_p, axis=1)[:, :k]
    tokens = np.zeros(len(logits), np.int64)
    return golden.Case(None, tokens, 1, ids, np.take_along_axis(log_p, ids, axis=1))


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 50), noise=st.floats(0, 3))
def test_the_divergence_never_exceeds_the_full_one(seed: int, k: int, noise: float) -> None:
    draw = np.random.default_rng(seed)
    reference = draw.standard_normal((11, 50)).astype(np.float32) * 3
    candidate = (reference + noise * draw.standard_normal((11, 50))).astype(np.float32)
    full = metrics.compare(reference, candidate, np.zeros(11, np.int64))
    found = golden.compare(case_of(reference, k), 0, candidate)
    assert (found.kl <= full.kl + 1e-7).all()
    np.testing.assert_array_equal(found.same_top1, full.same_top1)
    if k == 50:
        np.testing.assert_allclose(found.kl, full.kl, atol=1e-6)


def test_equal_models_do_not_diverge(made: golden.Golden, tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    runner = TorchRunner(tiny.load(tiny_bundles.base))
    found = golden.read(_file(tmp_path, made), tiny.VOCABULARY)
    for case in found.cases:
        result = golden.compare(case, 0, runner.logits(case.tokens))
        assert result.kl.max() < 1e-5 and result.same_top1.all()


def test_not_a_number_is_said(made: golden.Golden) -> None:
    case = made.cases[0]
    logits = np.zeros((len(case.tokens), tiny.VOCABULARY), np.float32)
    logits[3, 5] = np.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        golden.compare(case, 0, logits)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"cases": []},
        {"cases": "x"},
        {"cases": [1]},
        {"cases": [{"adapter": 3}]},
        {"tokens": [10**6]},
        {"tokens": [[1]]},
        {"prompt": 0},
        {"prompt": True},
        {"prompt": 10**9},
        {"ids": ["1"]},
        {"log_p": []},
        {"log_p": "positive"},
        {"tokens": [10**30]},
    ],
)
def test_malformed_vectors_are_refused(made: golden.Golden, tmp_path: Path, change: dict[str, Any]) -> None:
    path = _file(tmp_path, made)
    value = json.loads(path.read_text())
    if change.get("log_p") == "positive":
        change = {"log_p": [row.replace("-", "") for row in value["cases"][0]["log_p"]]}
    for key, new in change.items():
        (value if key in ("format", "cases") else value["cases"][0])[key] = new
    path.write_text(json.dumps(value))
    with pytest.raises(BundleError):
        golden.read(path, tiny.VOCABULARY)
    shutil.rmtree(tmp_path)
