"""What the device is, and how much memory is left to this process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from vera_edge.device.check import hardware

ARM = """processor : 0
Features : fp asimd asimdhp asimddp
CPU implementer : 0x41
CPU part : 0xd0b
"""


def test_a_processor_without_a_name_is_told_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: ARM if path == "/proc/cpuinfo" else "")
    found = hardware.hardware_info()
    assert found["processor"] == f"{platform.machine()}, implementer 0x41, part 0xd0b"
    assert found["features"] == ["asimd", "asimddp", "asimdhp"]


def test_where_the_system_tells_nothing_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: no /proc, no resource module, no affinity, no sysconf."""
    monkeypatch.setattr(hardware, "_read", lambda path: "")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert hardware.rss() is hardware.peak_rss() is hardware.free_memory() is None
    found = hardware.hardware_info()
    assert found["memory"] is None and found["cores"] == os.cpu_count() and found["processor"]


def test_the_peak_is_that_of_the_system_and_holds_what_was_taken() -> None:
    before, taken = hardware.peak_rss(), bytearray(50 << 20)
    taken[:: 1 << 12] = b"x" * len(taken[:: 1 << 12])  # a page that nothing was written to takes no memory
    after, now = hardware.peak_rss(), hardware.rss()
    assert before is not None and after is not None and now is not None
    assert after >= now >= len(taken)


def test_a_limit_on_addresses_bounds_what_is_free() -> None:
    code = (
        "import resource\n"
        "from vera_edge.device.check import hardware\n"
        "held = hardware._status('VmSize')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20),) * 2)\n"
        "print(hardware.free_memory())\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 32 << 20 < int(shown.stdout) <= 64 << 20


def test_a_control_groups_limit_bounds_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "memory.max").write_text("1000\n")
    (tmp_path / "box" / "memory.current").write_text("400\n")
    real = hardware._read
    monkeypatch.setattr(hardware, "_read", lambda path: "0::/box\n" if "self/cgroup" in path else real(path))
    assert hardware._left_in_group(tmp_path) == 600
    (tmp_path / "box" / "memory.max").write_text("max\n")
    assert hardware._left_in_group(tmp_path) is None
