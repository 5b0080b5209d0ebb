"""How much memory this process takes and may still take, as far as the system tells."""

from __future__ import annotations

import sys
from pathlib import Path


def rss() -> int | None:
    """Bytes of physical memory this process holds now; None where the system doesn't tell."""
    return _status("VmRSS")


def peak_rss() -> int | None:
    """The most bytes of physical memory this process has held; None where the system doesn't tell."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> int | None:
    """Bytes that this process may still take, by what the system, its control group and its limits say."""
    found = [value for value in (_available(), _left_in_group(), _left_to_map()) if value is not None]
    return min(found, default=None)


def read(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _available() -> int | None:
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Within the limit of this process's own control group (version 2)."""
    for line in read("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            folder = root / line[3:].lstrip("/")
            limit, held = read(str(folder / "memory.max")), read(str(folder / "memory.current"))
            if limit.strip().isdigit() and held.strip().isdigit():
                return max(0, int(limit) - int(held))
    return None


def _left_to_map() -> int | None:
    """Within RLIMIT_AS."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, held = resource.getrlimit(resource.RLIMIT_AS)[0], _status("VmSize")
    return None if limit == resource.RLIM_INFINITY or held is None else max(0, limit - held)


def _status(key: str) -> int | None:
    for line in read("/proc/self/status").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
