"""The wheel: what is in it, and that its device part works where nothing else is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import vera_edge
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (ROOT / "vera_edge", ROOT / "exporters")


def files_in_the_checkout() -> set[str]:
    """What the wheel must hold, as paths inside it: every file of the packages."""
    found = set()
    for path in (path for source in SOURCES for path in source.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            top = ROOT / "exporters" if path.is_relative_to(ROOT / "exporters") else ROOT
            found.add(path.relative_to(top).as_posix())
    return {name for name in found if "/" in name}


def exporter_packages() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "exporters").glob("*/__init__.py"))


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not files_in_the_checkout() - names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "vera_edge",
        *exporter_packages(),
    }


def test_the_wheel_says_that_it_is_typed_and_under_which_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert {f"{package}/py.typed" for package in ("vera_edge", *exporter_packages())} <= names
    assert "License-Expression: Apache-2.0" in text
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_exporters_is_a_folder_and_never_an_import_package(wheel: Path) -> None:
    """Another distribution owns the import name `exporters`; shipping it would break both."""
    assert not (ROOT / "exporters" / "__init__.py").exists()
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("exporters")]


def test_every_exporter_is_registered_and_loads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["vera_edge.exporters"]
    assert sorted({target.split(":")[0] for target in declared.values()}) == exporter_packages()
    installed = {point.name: point for point in entry_points(group="vera_edge.exporters")}
    assert set(installed) == set(declared)
    for name, point in installed.items():
        assert point.load().name == name


def test_every_dependency_is_pinned() -> None:
    """A fresh environment next month must be the one the tests ran in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(d for group in project["optional-dependencies"].values() for d in group),
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    for requirement in wanted:
        name = requirement.split(">=")[0].split("[")[0].lower()
        assert name in pinned, f"constraints.txt doesn't pin {name}"


def test_what_would_be_published_is_sound(published: Path) -> None:
    """The source distribution and the wheel built of it, checked as scripts/package does."""
    (wheel,), (source,) = published.glob("*.whl"), published.glob("*.tar.gz")
    for command in (("twine", "check", "--strict", wheel, source), ("check_wheel_contents", wheel)):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert not files_in_the_checkout() - set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"vera_edge-{vera_edge.__version__}-")


def test_the_version_is_the_same_everywhere() -> None:
    number = re.escape(vera_edge.__version__)
    assert re.search(
        rf"^## \[{number}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert re.search(rf"^version: {number}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_the_device_part_works_alone(fresh: Path) -> None:
    """No torch in the environment: the command answers, and the device package imports."""
    shown = subprocess.run([fresh / "vera-edge", "--help"], capture_output=True, text=True, check=True)
    assert "merge" in shown.stdout
    code = (
        "import importlib.util as u, vera_edge.device\n"
        "print([n for n in ('torch', 'transformers', 'peft', 'onnx', 'bitsandbytes') if u.find_spec(n)])"
    )
    found = subprocess.run([fresh / "python", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_the_build_extra_a_build_command_says_which_extra_is_missing(
    fresh: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    words = ["export", str(tiny_llama.nf4), str(tiny_adapter), "-o", str(tmp_path / "out"), "--onnx"]
    run = subprocess.run([str(fresh / "vera-edge"), *words], capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert "vera-edge[build]" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
