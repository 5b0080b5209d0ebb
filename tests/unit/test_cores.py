"""Cores within a CPU quota, read from trees of files as the kernel lays them out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from vera_edge import cores

UNIFIED = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
OLDER = (
    "31 23 0:28 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755",
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct",
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def system(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A system's root with these files in it, by path."""
    everything = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in everything.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 1),  # rounded down
        ("50000 100000", 1),  # at least one
        ("1000000 50000", 8),  # the affinity is less
        ("25000 10000", 2),  # another period
        ("", 8),
        ("100000 0", 8),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, quota: str, expected: int) -> None:
    """As in Docker with control groups of version 2: the container sees its own group as the root."""
    root = system(tmp_path, "0::/", UNIFIED, {"sys/fs/cgroup/cpu.max": quota})
    assert cores.available_cores(root) == expected


def test_a_quota_further_up_holds_too(tmp_path: Path) -> None:
    """As for a systemd service in a slice: each level may have a quota, and the least one holds."""
    levels = {
        "sys/fs/cgroup/batch.slice/cpu.max": "300000 100000",
        "sys/fs/cgroup/batch.slice/night.slice/cpu.max": "max 100000",
        "sys/fs/cgroup/batch.slice/night.slice/edge.service/cpu.max": "600000 100000",
        "sys/fs/cgroup/other.slice/cpu.max": "100000 100000",
    }
    root = system(tmp_path, "0::/batch.slice/night.slice/edge.service", UNIFIED, levels)
    assert cores.available_cores(root) == 3


@pytest.mark.parametrize("group", ["/../neighbour", "/somewhere/else"])
def test_a_group_that_the_mount_doesnt_show_is_the_mounts(tmp_path: Path, group: str) -> None:
    mounts = UNIFIED.replace(" / /sys", " /docker/ab\\040c /sys")
    root = system(tmp_path, f"0::{group}", mounts, {"sys/fs/cgroup/cpu.max": "400000 100000"})
    assert cores.available_cores(root) == 4


def test_a_mount_of_a_part_of_the_hierarchy(tmp_path: Path) -> None:
    """As in a container of version 2 without a namespace of its own: /proc tells the host's path."""
    mounts = UNIFIED.replace(" / /sys", " /docker/ab\\040c /sys")
    files = {"sys/fs/cgroup/cpu.max": "500000 100000", "sys/fs/cgroup/job/cpu.max": "200000 100000"}
    assert cores.available_cores(system(tmp_path, "0::/docker/ab c/job", mounts, files)) == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("250000", 2), ("30000", 1)])
@pytest.mark.parametrize("shown", ["/", "/docker/abc"])
def test_version_1(tmp_path: Path, quota: str, expected: int, shown: str) -> None:
    """Docker mounts a container's own part of the hierarchy, and /proc tells the host's path."""
    mounts = "\n".join(OLDER).format(root=shown)
    groups = "3:cpuset:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc"
    folder = "sys/fs/cgroup/cpu,cpuacct" + ("/docker/abc" if shown == "/" else "")
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    assert cores.available_cores(system(tmp_path, groups, mounts, files)) == expected


def test_where_there_are_no_groups_the_affinity_holds(tmp_path: Path) -> None:
    assert cores.available_cores(tmp_path) == 8
    assert cores.available_cores(system(tmp_path, "garbage", "garbage", {})) == 8


def test_libraries_that_read_no_quota_are_told(tmp_path: Path) -> None:
    free, bound = tmp_path / "free", tmp_path / "bound"
    system(free, "0::/", UNIFIED, {"sys/fs/cgroup/cpu.max": "max 100000"})
    system(bound, "0::/", UNIFIED, {"sys/fs/cgroup/cpu.max": "200000 100000"})
    environment: dict[str, str] = {}
    cores.bound_libraries(environment, free)
    assert environment == {}
    cores.bound_libraries(environment, bound)
    assert environment == {"OMP_NUM_THREADS": "2"}
    chosen = {"OMP_NUM_THREADS": "5"}
    cores.bound_libraries(chosen, bound)
    assert chosen == {"OMP_NUM_THREADS": "5"}
