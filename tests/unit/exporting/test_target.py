"""Targets are found by entry point, those of this repository like anybody else's."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from vera_edge.errors import TargetError
from vera_edge.exporting import target
from vera_edge.exporting.exporter import Exporter


def test_the_target_is_registered_and_goes_by_its_old_name_too() -> None:
    assert "onnx" in target.names()
    for name in ("onnx", "genai"):
        exporter = target.find(name)
        assert isinstance(exporter, Exporter) and exporter.name == "onnx"


def test_every_exporter_of_the_checkout_has_an_entry_point() -> None:
    packages = (Path(__file__).parents[3] / "exporters").glob("*/__init__.py")
    assert {f"vera_edge_{name}" for name in target.names()} >= {path.parent.name for path in packages}


def test_an_unknown_target() -> None:
    with pytest.raises(TargetError, match=r"no export target is called 'tflite'; installed: .*onnx"):
        target.find("tflite")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("a_package_that_is_not_there:EXPORTER", "needs the package a_package_that_is_not_there"),
        ("json:dumps", "isn't an Exporter"),
    ],
)
def test_a_broken_registration(value: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken", value, target.GROUP)
    monkeypatch.setattr(target, "entry_points", lambda group: EntryPoints([point]))
    with pytest.raises(TargetError, match=match):
        target.find("broken")
