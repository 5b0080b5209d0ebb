"""What the device is."""

from __future__ import annotations

import os
import platform
import sys

import pytest

from vera_edge import memory
from vera_edge.device.check import hardware

ARM = """processor : 0
Features : fp asimd asimdhp asimddp
CPU implementer : 0x41
CPU part : 0xd0b
"""


def test_a_processor_without_a_name_is_told_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "read", lambda path: ARM if path == "/proc/cpuinfo" else "")
    found = hardware.hardware_info()
    assert found["processor"] == f"{platform.machine()}, implementer 0x41, part 0xd0b"
    assert found["features"] == ["asimd", "asimddp", "asimdhp"]


def test_where_the_system_tells_nothing_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: no /proc, no resource module, no affinity, no sysconf."""
    monkeypatch.setattr(hardware, "read", lambda path: "")
    monkeypatch.setattr(memory, "read", lambda path: "")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert memory.rss() is memory.peak_rss() is memory.free_memory() is None
    found = hardware.hardware_info()
    assert found["memory"] is None and found["cores"] == os.cpu_count() and found["processor"]
