"""What an export takes is told before the work, near what it comes to, and held against what there is."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import vera_edge
from tests import tiny
from tests.conftest import Cli
from vera_edge.errors import OutputError, PlanError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def adapter(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_adapter(tiny_llama.fp32, tmp_path_factory.mktemp("costs") / "adapter")


@pytest.mark.parametrize("mode", ["merged", "branch"])
@pytest.mark.parametrize("weights", ["fp32", "int8", "int4", "nf4"])
def test_the_size_is_near_what_is_written(
    mode: str, weights: str, tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "mode": mode,
        "weights": weights,
        "head": "fp32",
        "projection_rounding": "float32",
    }
    planned = vera_edge.plan_export(tiny_llama.fp32, adapter, **asked)
    assert not list(tmp_path.iterdir())
    made = vera_edge.export(tiny_llama.fp32, adapter, out=tmp_path / "out", method="rtn", **asked)
    data = sum(path.stat().st_size for path in (tmp_path / "out" / "onnx").glob("*_data*"))
    assert made.plan == planned.plan
    # Tensors of this size leave much of a page empty.
    assert planned.cost.size == pytest.approx(data, rel=0.3)
    assert planned.cost.disk > planned.cost.size and planned.cost.seconds > 0


def test_a_dry_run_writes_nothing(
    tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    words = ["export", str(tiny_llama.fp32), str(adapter), "-o", str(tmp_path / "out"), "--weights", "int8"]
    words += ["--projection-rounding", "float32", "--dry-run"]
    shown = cli(*words)
    assert shown.exit_code == 0 and "memory" in shown.output and "disk" in shown.output
    told = json.loads(cli(*words, "--json").stdout)
    assert told["cost"]["memory"] > told["cost"]["size"] > 0 and told["plan"]["weights"] == "int8"
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_told_before_the_work(
    tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("vera_edge.exporting.costs.shutil.disk_usage", lambda _: Usage(0, 0, 100_000))
    with pytest.raises(OutputError, match=r"takes about 0 MB of the disk of .* smaller --weights"):
        vera_edge.export(
            tiny_llama.fp32,
            adapter,
            out=tmp_path / "out",
            weights="int8",
            progress=lambda what, *_: calls.append(what),
        )
    assert not calls and not list(tmp_path.iterdir())


def test_too_little_memory_is_told_before_the_work(
    tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vera_edge.exporting.costs.free_memory", lambda: 300_000_000)
    with pytest.raises(PlanError, match=r"takes about 7\d\d MB of memory, and 300 MB are free"):
        vera_edge.export(tiny_llama.fp32, adapter, out=tmp_path / "out", weights="int8")
    assert not list(tmp_path.iterdir())
