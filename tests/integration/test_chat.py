"""`vera-edge chat` as a script pipes lines into it, and as a person meets it in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vera_edge
from tests.tiny_bundle import TinyBundles


def pipe(folder: Path, lines: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vera_edge", "chat", str(folder), "--threads", "1", *map(str, words)]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)


def test_lines_that_are_piped_in_are_said_one_after_the_other(tiny_bundles: TinyBundles) -> None:
    talk = vera_edge.chat(tiny_bundles.branch, system="Be brief.", max_tokens=8, threads=1)
    lines = ["Merge the two.", "/adapter second", "And then?", "/adapter none", "Why?"]
    expected = "".join("".join(talk.take(line)) + "\n" for line in lines)
    words = ("--system", "Be brief.", "--max-tokens", 8)
    done = pipe(tiny_bundles.branch, "\n".join([*lines, "/quit", "never said"]), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected


def test_what_is_wrong_in_a_script_ends_it_with_a_sentence(tiny_bundles: TinyBundles) -> None:
    done = pipe(tiny_bundles.branch, "/adapter third\nnever said\n")
    assert done.returncode == 2 and done.stdout == ""
    assert "has no adapter named 'third'" in done.stderr and done.stderr.count("\n") == 1


class Terminal:
    """A pseudo-terminal with a command in it."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self._master, self.shown = process, master, ""

    def type(self, text: str) -> None:
        """As if keys were pressed; \\x03 is Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._master, text.encode())

    def interrupt(self, pattern: str, since: int) -> int:
        """Ctrl-C until `pattern` is shown: readline loses one that comes between its prompt and its wait."""
        for _ in range(5):
            self.type("\x03")
            try:
                return self.until(pattern, since, 10)
            except TimeoutError:
                continue
        raise TimeoutError(self.shown)

    def until(self, pattern: str, since: int = 0, seconds: float = 60) -> int:
        """Read until `pattern` was shown behind `since`; where it ends."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown[since:])):
            if time.monotonic() > ends:
                raise TimeoutError(self.shown)
            if select.select([self._master], [], [], 0.2)[0]:
                self.shown += os.read(self._master, 4096).decode(errors="replace")
        return since + found.end()


@contextmanager
def terminal(folder: Path, *words: object) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "vera_edge", "chat", str(folder), "--threads", "1", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_ctrl_c_stops_the_answer_only_and_ctrl_d_leaves(tiny_bundles: TinyBundles) -> None:
    with terminal(tiny_bundles.branch, "--max-tokens", 200) as person:
        at = person.until("/help says")
        at = person.until("> ", at)
        at = person.interrupt("Ctrl-C again, or Ctrl-D, leaves", at)
        at = person.until("> ", at)
        person.type("/adapter third\n")
        at = person.until("has no adapter named 'third'", at)
        at = person.until("> ", at)
        person.type("Merge the two.\n")
        at = person.until("two.\r\n.", at)
        at = person.interrupt("\n> ", at)
        person.type("/adapter none\n")
        at = person.until("adapter: none", at)
        at = person.until("> ", at)
        person.type("\x04")


def test_ctrl_c_twice_leaves(tiny_bundles: TinyBundles) -> None:
    with terminal(tiny_bundles.branch) as person:
        at = person.until("> ")
        at = person.interrupt("or Ctrl-D, leaves\r\n> ", at)
        person.interrupt("\n", at)
