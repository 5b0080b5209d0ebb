"""A real server process over a bundle, and raw requests to it: what tests of serving talk to."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """A server that runs. said: what it wrote on stderr until it listened."""

    process: subprocess.Popen[str]
    port: int
    said: str

    @property
    def url(self) -> str:
        """The base of OpenAI's clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> Any:
        """OpenAI's own client, which doesn't try again."""
        import openai

        given = {"api_key": "none", "max_retries": 0, "timeout": 120, **options}
        return openai.OpenAI(base_url=self.url, **given)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Status, JSON and headers of one raw request; `body`: bytes as they are, else as JSON."""
        status, read, answered = self._exchange(method, path, body, headers)
        return status, json.loads(read), answered

    def status(self, method: str, path: str, body: Any) -> int:
        """The status alone, of an answer that may be a stream."""
        return self._exchange(method, path, body, None)[0]

    def _exchange(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        read = answer.read()
        connection.close()
        return answer.status, read, answer.headers

    def memory(self) -> int:
        """Bytes of physical memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024


@contextmanager
def served(bundle: Path, *words: object, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`vera-edge serve BUNDLE WORDS...` on a free port; ended by Ctrl-C, which must be no failure."""
    command = [sys.executable, "-m", "vera_edge", "serve", str(bundle), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stderr is not None
    try:
        lines: list[str] = []
        while not (found := re.search(r"on http://.*:(\d+)/v1", line := process.stderr.readline())):
            assert line, f"the server ended: {''.join(lines)}"
            lines.append(line)
        yield Served(process, int(found[1]), "".join([*lines, line]))
        assert process.poll() is None, "the server ended by itself"
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest, rest
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
