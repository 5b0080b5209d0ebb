"""How much memory is left to this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vera_edge import memory


def test_the_peak_is_that_of_the_system_and_holds_what_was_taken() -> None:
    before, taken = memory.peak_rss(), bytearray(50 << 20)
    taken[:: 1 << 12] = b"x" * len(taken[:: 1 << 12])  # a page that nothing was written to takes no memory
    after, now = memory.peak_rss(), memory.rss()
    assert before is not None and after is not None and now is not None
    assert after >= now >= len(taken)


def test_a_limit_on_addresses_bounds_what_is_free() -> None:
    code = (
        "import resource\n"
        "from vera_edge import memory\n"
        "held = memory._status('VmSize')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20),) * 2)\n"
        "print(memory.free_memory())\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 32 << 20 < int(shown.stdout) <= 64 << 20


def test_a_control_groups_limit_bounds_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "memory.max").write_text("1000\n")
    (tmp_path / "box" / "memory.current").write_text("400\n")
    real = memory.read
    monkeypatch.setattr(memory, "read", lambda path: "0::/box\n" if "self/cgroup" in path else real(path))
    assert memory._left_in_group(tmp_path) == 600
    (tmp_path / "box" / "memory.max").write_text("max\n")
    assert memory._left_in_group(tmp_path) is None
