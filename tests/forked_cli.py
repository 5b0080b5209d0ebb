"""`vera-edge` in forks of one process that has imported everything: many runs, killed or starved, quickly.

    python -m tests.forked_cli          one JSON order a line on stdin, one JSON answer a line on stdout

Orders: {"do": "start", "words": [...], "log": FILE, ...} answers {"pid": N}; {"do": "wait", "pid": N} answers
{"status": N} (negative for a signal). More keys of "start":

    kill_at    N: SIGKILL itself at the Nth thing it does to a file (open to write, rename, mkdir, remove ...)
    count      FILE: where to write how many of these there were
    disk       FOLDER: a small disk of its own there, `size` bytes; what it held is copied to `after`, then it
               grows to `grown` bytes, the same command runs again, and what it holds is copied to `finally`
    read_only  FOLDER: can't be written while the command runs
    clock      N: each look at the clock finds it N seconds ahead, or N behind, in turns

The small disk is a tmpfs in a mount namespace of the fork's own. Where the system allows no such namespace
the limit is one on the size of a file, which fails in the same places with another errno, and what is
read-only is so by its permissions.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Loaded before any fork. None of them starts a thread until it computes, and this process never does.
HEAVY = (
    "onnxruntime_genai.models.builder",
    "peft",
    "model_signing.signing",
    "cyclonedx.output.json",
    "vera_edge_onnx.decoder.export",
    "vera_edge.cli.release",
    "vera_edge.releasing.run",
    "vera_edge.measuring.opened_candidate",
    "vera_edge.measuring.opened_reference",
    "vera_edge.reference.model",
)
_CHANGES = {
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "os.chmod",
    "ctypes.dlsym",
}
_NEWNS, _NEWUSER = 0x20000, 0x10000000  # linux/sched.h


class _Counter:
    """Counts what is done to files, and kills this process at the `last`."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if event in _CHANGES or writes:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def _mount(*words: str) -> bool:
    """Mount in a namespace of this process's own; False where a process may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEWNS | _NEWUSER) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return subprocess.run(["mount", *words], check=False).returncode == 0


def _protect(folder: Path) -> None:
    if _mount("--bind", str(folder), str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
    else:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode & 0o555)


def _unsettle(step: int) -> None:
    """The clock jumps by twice `step` seconds from each look at it to the next."""
    steady, looks = time.time_ns, itertools.cycle((step, -step))
    time.time_ns = lambda: steady() + next(looks) * 10**9
    time.time = lambda: time.time_ns() / 1e9


def _grow(folder: Path, mounted: bool, size: int) -> None:
    if mounted:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _command(words: list[str]) -> int:
    """The command's exit code; a traceback, which is a bug, is printed and counts as 70."""
    from vera_edge.cli import main

    try:
        main(words, standalone_mode=False)
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _run(order: dict[str, Any]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "clock" in order:
        _unsettle(order["clock"])
    if "read_only" in order:
        _protect(Path(order["read_only"]))
    if "disk" not in order:
        counter = _Counter(order.get("kill_at"))
        sys.addaudithook(counter)
        status = _command(order["words"])
        if "count" in order:
            Path(order["count"]).write_text(str(counter.count))
        return status
    folder = Path(order["disk"])
    mounted = _mount("-t", "tmpfs", "-o", f"size={order['size']}", "none", str(folder))
    if not mounted:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["size"] // 4, hard))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    status = _command(order["words"])
    _grow(folder, mounted, order["grown"])
    shutil.copytree(folder, order["after"])
    print(f"\nexit {status}; the disk has grown", flush=True)
    again = _command(order["words"])
    shutil.copytree(folder, order["finally"])
    return 0 if again == 0 else again


def main() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "wait":
            status = os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1])
            print(json.dumps({"status": status}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            status = 71
            try:
                status = _run(order)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
