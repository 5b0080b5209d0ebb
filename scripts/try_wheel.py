"""Install a wheel as a stranger would, in a bare environment of each Python, and import all that it holds.

    python -m scripts.try_wheel WHEEL [--python PROGRAM ...] [--extras build,serve]

By default every Python from 3.11 to 3.13 that is found by its name. `vera-edge --help` and `vera-edge doctor`
must answer, every module must compile without a warning, and every module must be imported. Without extras
those may fail that miss a package of an extra; which packages is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.prepare_demo import ROOT

PYTHONS = ("python3.11", "python3.12", "python3.13")

# Imports every module, and prints how many were, and which packages others miss.
IMPORTS = """
import importlib, json, pkgutil, sys
imported, missing, left = 0, set(), ["vera_edge", "vera_edge_onnx", "vera_edge_gguf"]
while left:
    name = left.pop()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.startswith("vera_edge"):
            raise
        missing.add(error.name)
        continue
    imported += 1
    inside = pkgutil.iter_modules(getattr(module, "__path__", ()), name + ".")
    left += [one.name for one in inside if not one.name.endswith(".__main__")]
print(json.dumps([sys.version.split()[0], imported, sorted(missing)]))
"""


def try_wheel(wheel: Path, python: str, extras: str, folder: Path) -> str:
    """Make an environment in `folder` and try the wheel there; a sentence of what was found.

    Raises CalledProcessError when something that must work doesn't.
    """
    programs = folder / "bin"
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: object) -> str:
        command = [str(word) for word in words]
        return subprocess.run(
            command, cwd=folder, env=bare, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    subprocess.run([python, "-m", "venv", str(folder)], env=bare, check=True)
    asked = f"{wheel}[{extras}]" if extras else str(wheel)
    run(programs / "pip", "install", "-qq", asked, "-c", ROOT / "constraints.txt")
    assert "merge" in run(programs / "vera-edge", "--help")
    json.loads(run(programs / "vera-edge", "doctor", "--json"))
    (packages,) = folder.glob("lib/python3*/site-packages")
    own = [packages / name for name in ("vera_edge", "vera_edge_onnx", "vera_edge_gguf")]
    run(programs / "python", "-W", "error", "-m", "compileall", "-q", "-f", *own)
    version, imported, missing = json.loads(run(programs / "python", "-c", IMPORTS))
    assert not (missing and extras), f"{', '.join(missing)} can't be imported with [{extras}]"
    others = f"; others need {', '.join(missing)}" if missing else ""
    return f"Python {version}: {imported} modules imported{others}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", help="a program; as often as there are")
    parser.add_argument("--extras", default="", help="of the wheel, with commas")
    given = parser.parse_args()
    tried = 0
    for python in given.python or PYTHONS:
        if not given.python and not _is_there(python):
            print(f"{python}: not found here")
            continue
        with tempfile.TemporaryDirectory(prefix="try-wheel-") as folder:
            print(try_wheel(given.wheel.resolve(), python, given.extras, Path(folder)), flush=True)
        tried += 1
    sys.exit(0 if tried else "no Python was tried")


def _is_there(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    main()
