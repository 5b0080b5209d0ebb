"""Open a drift report in headless Chromium, light and dark, wide and narrow, and hold it to its own JSON.

    python -m scripts.check_report REPORT.html [--shots FOLDER]

Fails when the browser logs anything to its console, when the page is wider than a phone, or when a figure on
the page differs from the JSON it carries. Screenshots and a PDF go to FOLDER. Needs chromium
(apt-get install chromium).
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FIGURE = re.compile(r'<span data-figure="([^"]+)" data-form="([^"]+)">([^<]*)</span>')
_DATA = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
# An old headless mode has no window narrower than 500 pixels.
_VIEWS = {"wide": (1100, 3600), "narrow": (500, 5200)}


def browser() -> str:
    """The installed Chromium; exits with what to install when there is none."""
    found = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit("check_report: no Chromium here; install it with: apt-get install chromium")
    return found


def run(*options: str, page: str) -> subprocess.CompletedProcess[str]:
    """One headless run with a profile of its own and the console on stderr."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", f"--user-data-dir={profile}", *options, page,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def console(log: str) -> list[str]:
    """What the page said on the browser's console."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def disagreements(dom: str) -> list[str]:
    """Figures on the page that aren't the JSON's, formatted as they say."""
    data = _DATA.search(dom)
    if data is None:
        return ["the page carries no JSON"]
    report: dict[str, Any] = json.loads(data[1])
    found = _FIGURE.findall(dom)
    wrong = [] if len(found) > 20 else [f"only {len(found)} figures are on the page"]
    for path, form, shown in found:
        value: Any = report
        for part in html.unescape(path).split("/"):
            value = value[part]
        if format(value, form) != html.unescape(shown):
            wrong.append(f"{path} shows {shown}, the JSON has {value!r}")
    return wrong


def check(report: Path, shots: Path) -> list[str]:
    """What is wrong with the report; empty when nothing is."""
    page = report.resolve().as_uri()
    shots.mkdir(parents=True, exist_ok=True)
    opened = run("--dump-dom", page=page)
    wrong = disagreements(opened.stdout) + console(opened.stderr)
    for view, (width, height) in _VIEWS.items():
        for theme, option in (("light", "--disable-features=DarkMode"), ("dark", "--force-dark-mode")):
            picture = shots / f"{report.stem}-{view}-{theme}.png"
            taken = run(option, f"--window-size={width},{height}", f"--screenshot={picture}", page=page)
            wrong += console(taken.stderr)
            if not picture.is_file():
                wrong.append(f"no screenshot was taken: {taken.stderr.strip()[-300:]}")
    printed = shots / f"{report.stem}.pdf"
    run("--no-pdf-header-footer", f"--print-to-pdf={printed}", page=page)
    if not printed.is_file():
        wrong.append("the report can't be printed")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--shots", type=Path, default=Path("report-shots"))
    words = parser.parse_args()
    wrong = check(words.report, words.shots)
    for line in wrong:
        print(line)
    print(
        f"{words.report}: {'not as it should be' if wrong else 'opens cleanly, and its figures are its JSON'}"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
