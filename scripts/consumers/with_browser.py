"""The same with Transformers.js in headless Chromium; the first word is the folder of its Node.js packages.

Serves page, packages and the exported folder on the loopback address; the page posts its answer back. With
SHOT in the environment, a picture of the page with its answer is written there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

PAGE = Path(__file__).with_name("browser.html")
LIMIT = 600.0  # seconds for one answer
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Answered(threading.Event):
    """Set when the page has posted what it said."""

    value: dict[str, Any]


class Handler(SimpleHTTPRequestHandler):
    """/ is the page, /node the packages, /models what lies beside the exported folder."""

    def __init__(self, places: dict[str, Path], answered: Answered, *words: Any) -> None:
        self.places, self.answered = places, answered
        super().__init__(*words)

    def translate_path(self, path: str) -> str:
        """The file behind a URL."""
        inside = super().translate_path(path)
        parts = Path(inside).relative_to(Path(self.directory)).parts
        if not parts:
            return str(PAGE)
        return str(self.places.get(parts[0], Path("/nowhere")).joinpath(*parts[1:]))

    def do_GET(self) -> None:
        """A file; or, for /answered, nothing, once there is an answer: the page isn't loaded before."""
        if self.path != "/answered":
            super().do_GET()
            return
        self.answered.wait(LIMIT)
        self.send_response(204)
        self.end_headers()

    def do_POST(self) -> None:
        """The page's answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answered.value = json.loads(body)
        self.answered.set()
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Nothing on the terminal."""


def installed() -> str | None:
    """The browser's program."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def main(node: Path, folder: Path, prompt: str, count: str, adapter: str | None = None) -> None:
    """Print what the page said, as JSON."""
    browser = installed()
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    answered = Answered()
    places = {"node": node / "node_modules", "models": folder.resolve().parent}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, places, answered))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = {"name": folder.name, "prompt": prompt, "count": count}
    if adapter:
        asked["adapter"] = Path(adapter).stem
    words = "&".join(f"{key}={quote(value)}" for key, value in asked.items())
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        if shot := os.environ.get("SHOT"):
            command += [f"--screenshot={Path(shot).resolve()}", "--window-size=760,330", "--hide-scrollbars"]
        command.append(f"http://127.0.0.1:{server.server_port}/?{words}")
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not answered.wait(LIMIT):
                raise SystemExit("the browser gave no answer")
            if shot:  # it ends by itself
                running.wait(LIMIT)
        finally:
            running.terminate()
            running.wait()
    server.shutdown()
    if "error" in answered.value:
        raise SystemExit(answered.value["error"])
    print(json.dumps(answered.value))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
