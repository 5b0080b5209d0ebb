"""A command in a process of its own, and what it cost: time, processor, memory, disk. Linux only (/proc).

Memory and disk are sampled while it runs. The peak of memory is the kernel's own high-water mark (VmHWM) of
the largest process, or the largest sum over all of its processes that was seen, whichever is more: it counts
pages of mapped files, which the system can take back. `anonymous` is the largest sum without those.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_EVERY = 0.05  # seconds between two looks at memory
_DISK_EVERY = 10  # looks at memory to a look at the disk
# What makes a library use other threads than it would where a person runs it.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time and bytes of memory after which a command is ended; None: without end."""

    seconds: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a command took. `end`: "done", "over the time", "over the memory", or "failed".

    wall, cpu: seconds. peak, anonymous, disk: bytes; disk: by how much the watched folder grew at most.
    output: what it wrote to stdout, and `said` the end of what it wrote to stderr.
    """

    end: str
    wall: float
    cpu: float
    peak: int
    anonymous: int
    disk: int
    output: str
    said: str


def run(
    command: Sequence[str | Path],
    work: Path,
    limits: Limits | None = None,
    environment: Mapping[str, str] | None = None,
    exits: Sequence[int] = (0,),
) -> Cost:
    """Run a command to its end, with `work` as its folder for temporary files, whose growth is its disk.

    exits: the exit codes of a command that did its work.
    """
    known = {name: value for name, value in os.environ.items() if name not in _THREADS}
    known |= {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before, logs = folder_bytes(work), (work / ".stdout", work / ".stderr")
    with logs[0].open("w") as out, logs[1].open("w") as err:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            env=known | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        watch = _Watch(process.pid, work, limits or Limits())
        usage = watch.until_it_ends()
        wall = time.perf_counter() - begun
    process.returncode = usage[0]
    output, said = (log.read_text(errors="replace") for log in logs)
    for log in logs:
        log.unlink()
    end = watch.ended_for or ("done" if usage[0] in exits else "failed")
    return Cost(end, wall, usage[1], watch.peak, watch.anonymous, watch.disk - before, output, _tail(said))


@dataclass
class _Watch:
    """A running command, looked at from time to time, and ended where it goes over a limit."""

    pid: int
    work: Path
    limits: Limits
    peak: int = 0
    anonymous: int = 0
    disk: int = 0
    ended_for: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def until_it_ends(self) -> tuple[int, float]:
        """Its exit status, and the seconds of processor of it and of all that it waited for."""
        watching = threading.Thread(target=self._look_on, daemon=True)
        watching.start()
        try:
            _, status, usage = os.wait4(self.pid, 0)
        except BaseException:
            self._kill()
            raise
        finally:
            self.over.set()
            watching.join()
        self._kill()  # what it left running
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def _look_on(self) -> None:
        begun, looks = time.monotonic(), 0
        while True:
            self._look()
            if looks % _DISK_EVERY == 0:
                self.disk = max(self.disk, folder_bytes(self.work))
            looks += 1
            if self.limits.seconds is not None and time.monotonic() - begun > self.limits.seconds:
                self._end("over the time")
            if self.over.wait(_EVERY):
                self.disk = max(self.disk, folder_bytes(self.work))
                return

    def _look(self) -> None:
        seen = [status for pid in descendants(self.pid) if (status := _status(pid))]
        if not seen:
            return
        total = sum(one["VmRSS"] for one in seen)
        self.peak = max(self.peak, total, *(one["VmHWM"] for one in seen))
        anonymous = sum(one["RssAnon"] for one in seen)
        self.anonymous = max(self.anonymous, anonymous)
        if self.limits.memory is not None and anonymous > self.limits.memory:
            self._end("over the memory")

    def _end(self, why: str) -> None:
        self.ended_for = self.ended_for or why
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def descendants(pid: int) -> Iterator[int]:
    """A process, its children, their children."""
    yield pid
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from descendants(int(child))


def _status(pid: int) -> dict[str, int]:
    """Bytes of memory by their name in /proc; empty for a process that ends."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    sizes = {name: int(value.split()[0]) * 1024 for name, value in pairs}
    return sizes if "VmHWM" in sizes else {}


def folder_bytes(folder: Path) -> int:
    """Bytes that a folder's files take on the disk; a file that goes meanwhile counts nothing."""
    total, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def forget(folder: Path) -> None:
    """Have the system drop what it holds of a folder's files, so that a command reads them from the disk."""
    for file in folder.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _tail(said: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
