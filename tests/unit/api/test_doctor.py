"""What `doctor` says of this machine, and of one that lacks something."""

from __future__ import annotations

import importlib
import json
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import vera_edge
from tests.conftest import Cli
from vera_edge.api import doctor
from vera_edge.cores import available_cores

ROOT = Path(__file__).resolve().parents[3]


def test_it_lists_every_package_that_the_project_uses() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {(each.name.lower(), each.extra) for each in vera_edge.doctor().packages}
    for line in project["dependencies"]:
        assert (line.partition(">")[0].lower(), None) in listed
    assert {extra for _, extra in listed} <= {None, *project["optional-dependencies"]} - {"test", "dev"}


def test_it_says_what_this_machine_is(cli: Cli) -> None:
    result = cli("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["broken"] == []
    assert found["cores"]["usable"] == available_cores()
    versions = {each["name"]: each["installed"] for each in found["packages"]}
    for name in ("numpy", "onnxruntime", "torch"):
        assert versions[name] == metadata.version(name)
    assert found["machine"]["features"] and found["machine"]["kernels"]
    shown = cli("doctor")
    assert shown.exit_code == 0 and found["machine"]["processor"] in shown.stdout


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"onnxruntime": "1.2"}, "onnxruntime is 1.2, and 1.22 or newer is needed"),
        ({"tokenizers": None}, "tokenizers isn't installed"),
    ],
)
def test_what_the_device_part_lacks_is_exit_3(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], says: str
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: changed.get(name, "999"))
    result = cli("doctor")
    assert result.exit_code == 3 and f"the device part can't work: {says}" in result.stderr


def test_a_library_that_cannot_be_loaded_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def load(name: str) -> Any:
        if name == "safetensors":
            raise OSError("wrong ELF class\nmore")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", load)
    result = cli("doctor")
    assert result.exit_code == 3 and "can't be imported (wrong ELF class)" in result.stderr


def test_a_missing_extra_is_no_fault_and_has_its_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "ray") else "999")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "build: torch missing or too old; pip install 'vera-edge[build]'" in result.stdout
    assert "pip install 'vera-edge[ray]'" in result.stdout


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", nothing)
    assert "vera-edge itself isn't installed" in vera_edge.doctor().broken[0]
