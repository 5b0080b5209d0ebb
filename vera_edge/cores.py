"""How many cores this process may use: its affinity, and the CPU quota of the control groups it lies in.

A container with `--cpus=1` or a service with `CPUQuota=100%` still sees every core of its host. A thread for
each of them gets its turn only now and then, which is several times slower than one thread that runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """The least of affinity (or the machine's cores) and CPU quota, rounded down, at least 1.

    A quota of 1.5 cores gives 1: a second thread would stand still half of the time. `root` is where
    /proc and the control groups' mounts are looked for.
    """
    cores = _affinity()
    return max(1, min(cores, int(min(_quotas(root), default=cores))))


def bound_libraries(environment: MutableMapping[str, str] | None = None, root: Path = _ROOT) -> None:
    """Tell OpenMP and BLAS of a quota below the affinity, which they don't read by themselves.

    Sets OMP_NUM_THREADS unless it is there; of use only before numpy and torch are imported.
    """
    variables = os.environ if environment is None else environment
    if (cores := available_cores(root)) < _affinity():
        variables.setdefault("OMP_NUM_THREADS", str(cores))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """The quota, in cores, of every control group from this process's own up to the root that has one."""
    try:
        groups = _read(root / "proc/self/cgroup").splitlines()
        mounts = _read(root / "proc/self/mountinfo").splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        unified = number == "0" and not controllers
        if unified or "cpu" in controllers.split(","):
            for folder in _folders(PurePosixPath(group), mounts, unified):
                quota = _unified_quota(root / folder) if unified else _older_quota(root / folder)
                if quota is not None:
                    yield quota


def _folders(group: PurePosixPath, mounts: list[str], unified: bool) -> Iterator[PurePosixPath]:
    """The folders (without the leading slash) of a group and of all that it lies in, as far as mounted.

    A mount may show a part of the hierarchy only (its root, the fourth field of mountinfo), as for a
    container's own.
    """
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        if not (kind[0] == "cgroup2" if unified else kind[0] == "cgroup" and "cpu" in kind[2].split(",")):
            continue
        top, point = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        if ".." in inside.parts:  # the process was moved out of what its namespace shows
            inside = PurePosixPath()
        place = point.relative_to("/")
        yield from (place / part for part in (inside, *inside.parents))
        return


def _unescaped(field: str) -> str:
    """A path of mountinfo, which has spaces and their like in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _unified_quota(folder: Path) -> float | None:
    """Version 2: `cpu.max` holds quota and period, or "max" and the period."""
    try:
        quota, period = _read(folder / "cpu.max").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _older_quota(folder: Path) -> float | None:
    """Version 1: a quota of -1 is none."""
    try:
        quota = int(_read(folder / "cpu.cfs_quota_us"))
        return quota / int(_read(folder / "cpu.cfs_period_us")) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read(path: Path) -> str:
    return path.read_text(errors="replace")
