"""Which small files travel with a model, and that no link brings others in."""

from __future__ import annotations

from pathlib import Path

import pytest

from vera_edge.errors import CheckpointError, OutputError
from vera_edge.storage import side_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "subfolder").mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "LICENSE",
        "config.json",
        "model.safetensors",
        "tokenization_own.py",
        "scaler.pt",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "additional_chat_templates/run.py",
        "subfolder/vocab.json",
    ):
        (folder / name).write_bytes(name.encode())
    return folder


def test_copies_what_belongs_and_nothing_else(model: Path, tmp_path: Path) -> None:
    copied = side_files.copy(model, tmp_path / "out")
    assert set(copied) == {
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "LICENSE",
        "additional_chat_templates/tool.jinja",
    }
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "out").as_posix() for path in files} == set(copied)
    assert all(path.read_bytes() == path.relative_to(tmp_path / "out").as_posix().encode() for path in files)


def test_only_those_asked_for(model: Path, tmp_path: Path) -> None:
    assert side_files.copy(model, tmp_path / "out", ["tokenizer.json"]) == ("tokenizer.json",)
    with pytest.raises(CheckpointError, match="can't be read"):
        side_files.copy(model, tmp_path / "out", ["vocab.json"])


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool.jinja"])
def test_a_link_out_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of"):
        side_files.copy(model, tmp_path / "out")


def test_a_folder_that_is_a_link_out_is_refused(model: Path, tmp_path: Path) -> None:
    templates = model / "additional_chat_templates"
    templates.rename(tmp_path / "elsewhere")
    templates.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of"):
        side_files.copy(model, tmp_path / "out")


def test_a_link_within_the_folder_is_followed(model: Path, tmp_path: Path) -> None:
    (model / "vocab.json").symlink_to(model / "tokenizer.json")
    side_files.copy(model, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    assert (tmp_path / "out" / "vocab.json").read_bytes() == b"tokenizer.json"


def test_a_target_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="can't write"):
        side_files.copy(model, tmp_path / "out")
