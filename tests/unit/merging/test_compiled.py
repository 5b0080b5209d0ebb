"""A merge by compiled loops and in large pieces has the bytes of one by numpy, in small ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from vera_edge import formats
from vera_edge import merging as merge
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import ProjectionSpec, regenerate
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.formats import compiled
from vera_edge.merging import delta, memory, work
from vera_edge.merging.memory import Resources
from vera_edge.parallel import Engine


@pytest.fixture(autouse=True)
def _numpy_after() -> Iterator[None]:
    yield
    compiled.stop()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["same", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("source", ["nf4", "sharded"])
def test_the_same_bytes_either_way(
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    to: str,
) -> None:
    ready = merge.prepare(getattr(tiny_llama, source), [(tiny_adapter, 1.0)], to)
    slow = merge.perform(ready, tmp_path / "numpy")
    assert not compiled.takes()  # too small for it
    monkeypatch.setattr(work, "COMPILED_FROM", 1)
    fast = merge.perform(ready, tmp_path / "compiled", resources=Resources(Engine(workers=2)))
    assert compiled.takes()
    assert contents(tmp_path / "numpy") == contents(tmp_path / "compiled")
    assert slow.to_dict() | {"folder": ""} == fast.to_dict() | {"folder": ""}


def test_little_memory_leaves_no_room_for_a_compiler(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "COMPILED_FROM", 1)
    ready = merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)], "nf4")
    merge.perform(ready, tmp_path / "small", resources=Resources(Engine(), memory.ROOM - 1))
    assert not compiled.takes()
    merge.perform(ready, tmp_path / "large", resources=Resources(Engine(), memory.ROOM))
    assert compiled.takes()
    assert contents(tmp_path / "small") == contents(tmp_path / "large")


@pytest.mark.parametrize("out", [100, 128, 384, 400, 900])
def test_larger_products_of_a_wide_layer_sum_alike(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, inside, rank = np.random.default_rng(3), 20_000, 8
    vectors = LambdaVectors(*(rng.standard_normal(size).astype(np.float32) for size in (out, rank)))
    adapter = Adapter(Path(), "a", None, rank, 7, {"fc": vectors}, None, {}, {}, {}, None, "0")
    change = delta.Delta("fc", inside, [(adapter, 1.0)], regenerate(ProjectionSpec(3, rank, inside, out)))
    bf16 = formats.get("bf16")
    base = bf16.quantize(rng.standard_normal((out, inside)).astype(np.float32), bf16.options({}))
    large = delta.merge_rows("fc", base, change)
    assert delta.piece_rows(base.shape, 1) == min(out, 384)
    monkeypatch.setattr(delta, "PRODUCT_ROWS", 1)
    assert delta.piece_rows(base.shape, 1) == min(out, 128)
    assert np.array_equal(large.view(np.uint32), delta.merge_rows("fc", base, change).view(np.uint32))


def test_a_numba_that_cannot_be_loaded_is_none(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from vera_edge.formats import compiled; "
        "print(compiled.start(), compiled.takes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
