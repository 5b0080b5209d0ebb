"""Validation on this device: a sound bundle passes, and each thing that can be wrong fails its own check."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny, tiny_bundle
from tests.tiny_bundle import TinyBundles
from vera_edge.bundle import contents as bundle
from vera_edge.device.check import validate_decoder as validation
from vera_edge.device.check.validate import Validation, validate
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError


def failed(result: Validation) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


@pytest.fixture(scope="module")
def golden_branch(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "branch"
    return tiny_bundle.with_golden(
        tiny_bundles, tiny_bundles.branch, folder, {"max_kl": 1e-4, "min_top1": 1.0}
    )


def test_a_sound_bundle_passes_for_every_adapter(golden_branch: Path) -> None:
    result = validate(golden_branch)
    assert result.passed, failed(result)
    assert [drift.adapter for drift in result.drift] == [None, "first", "second"]
    for drift in result.drift:
        assert drift.kl < 1e-5 and drift.same_top1 == 1 and drift.greedy == 1 and drift.positions > 20
    assert {"files", "determinism", "swap", "leaks", "drift (first)"} <= {
        check.name for check in result.checks
    }
    assert result.device["threads"] >= 1 and result.device["tools"]["onnxruntime"]
    assert result.to_dict()["passed"] is True


def test_the_wrong_adapter_is_caught(golden_branch: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_branch, tmp_path / "b")
    tiny_bundle.write_adapter(folder / "adapters" / "second.onnx_adapter", tiny_bundle.vectors(9))
    tiny_bundle.rewrite(folder)
    result = validate(folder)
    assert set(failed(result)) == {"drift (second)"}


def test_a_coarser_model_breaks_its_limit_and_says_by_how_much(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    folder = tiny_bundle.with_golden(tiny_bundles, tiny_bundles.int4, tmp_path / "b", {"max_kl": 1e-4})
    result = validate(folder)
    assert set(failed(result)) == {"drift (model)"}
    assert "max_kl" in next(check.detail for check in result.checks if not check.passed)
    drift = result.drift[0]
    assert drift.prompt_kl > 1e-4 and drift.step_kl > 1e-4 and drift.kl_max >= drift.kl_p99 >= drift.kl
    assert validate(folder, limits={"max_kl": 100.0}).passed


def test_limits_that_need_the_reference_are_named_not_passed_over(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    folder = tiny_bundle.with_golden(tiny_bundles, tiny_bundles.fp32, tmp_path / "b", {"min_retained": 0.5})
    result = validate(folder)
    assert any("min_retained" in note for note in result.notes)
    assert any("measured, not judged" in note for note in result.notes)


def test_a_memory_limit_is_held(golden_branch: Path) -> None:
    assert failed(validate(golden_branch, max_memory=1 << 20)) == ["memory"]
    assert validate(golden_branch, max_memory=1 << 40).passed


def test_without_golden_vectors_there_is_nothing_to_judge(tiny_bundles: TinyBundles) -> None:
    with pytest.raises(BundleError, match="carries no golden vectors"):
        validate(tiny_bundles.branch)


def test_a_run_that_does_not_repeat_is_caught(golden_branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing a sound runtime never does is done to it here: bits that differ from call to call."""
    real, draw = Session.logits, np.random.default_rng(0)

    def shaky(self: Session, tokens: Any) -> Any:
        return real(self, tokens) + draw.standard_normal(tiny.VOCABULARY).astype(np.float32) * np.float32(
            1e-6
        )

    monkeypatch.setattr(Session, "logits", shaky)
    assert set(failed(validate(golden_branch))) == {"determinism", "swap"}


def test_a_leak_is_caught(golden_branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, kept = validation._generate, []

    def leaking(*arguments: Any) -> list[int]:
        # Pages of their own: an array could be made of memory that the process already held.
        kept.append(mmap.mmap(-1, 2 << 20))
        kept[-1].write(b"\1" * (2 << 20))
        return real(*arguments)

    monkeypatch.setattr(validation, "_generate", leaking)
    assert failed(validate(golden_branch)) == ["leaks"]


def test_an_adapter_that_does_nothing_is_caught(golden_branch: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_branch, tmp_path / "b")
    zeros = {name: np.zeros_like(array) for name, array in tiny_bundle.vectors(1).items()}
    tiny_bundle.write_adapter(folder / "adapters" / "first.onnx_adapter", zeros)
    tiny_bundle.rewrite(folder)
    assert set(failed(validate(folder))) == {"drift (first)", "swap"}
    manifest = bundle.read(folder)
    assert manifest.limits == {"max_kl": 1e-4, "min_top1": 1.0}
