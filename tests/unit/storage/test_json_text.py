"""JSON that nobody vouches for: every way in which it can be wrong is one sentence, and soon found."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from vera_edge.errors import BundleError, CheckpointError
from vera_edge.storage.json_text import (
    SETTINGS,
    Bound,
    canonical_json,
    parse_json,
    read_json,
    read_value,
    settings_json,
)
from vera_edge.storage.tensors import read_header


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "isn't valid JSON"),
        (b"", "isn't valid JSON"),
        (b"\xff{}", "isn't valid JSON"),
        (b'{"a": "\xed\xa0\x80"}', "isn't valid JSON"),  # a surrogate as bytes, which json.loads takes
        ('{"a": 1}'.encode("utf-16"), "isn't valid JSON"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"\\uDFFF": 1}', "lone surrogate"),
        (b'{"a": ["\\udc00\\ud800"]}', "lone surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": ' + b"9" * 400 + b"}", "an integer of 400 digits"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "levels of nesting"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "isn't valid JSON"),
        (b"[]", "holds a JSON list where an object belongs"),
        (b"3", "holds a JSON int where an object belongs"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_json(path, CheckpointError)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_read(tmp_path: Path) -> None:
    """As Python reads it: a byte order mark, infinities, pairs of surrogates, "no limit" as 10**30."""
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": -Infinity, "c": 1' + b"0" * 30 + b"}")
    assert read_json(path, CheckpointError) == {"a": "\U0001f600", "b": float("-inf"), "c": 10**30}
    deep = json.loads("[" * 60 + "]" * 60)
    path.write_bytes(canonical_json(deep))
    assert read_value(path, CheckpointError) == deep


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        read_json(tmp_path / "a.json", BundleError)
    with pytest.raises(BundleError, match="can't be read"):
        read_json(tmp_path, BundleError)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
        with pytest.raises(BundleError, match="isn't a plain file"):
            read_json(tmp_path / "pipe.json", BundleError)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,", b'"ab",', b'{"a":{}},', b"[[[[[]]]]],"])
def test_a_text_within_its_size_takes_no_multiple_of_it(tmp_path: Path, piece: bytes) -> None:
    """8 MiB of empty lists became 200 MB of objects."""
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": [' + piece * ((8 << 20) // len(piece)) + b"0]}")
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match="values, which nothing sound does"):
        read_json(path, CheckpointError)
    assert time.process_time() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="is over 16 MiB of JSON"):
        read_json(path, CheckpointError)
    assert parse_json(b"[1,2]", "a list", CheckpointError, Bound(5, 2)) == [1, 2]
    for bound in (Bound(4, 2), Bound(5, 1)):
        with pytest.raises(CheckpointError, match="a list"):
            parse_json(b"[1,2]", "a list", CheckpointError, bound)
    assert SETTINGS.values >= 1_000_000  # an index of a large model of experts has some 100 000 tensors


def _entry(shape: str) -> str:
    return f'"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 0]}}'


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ('"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}', "lone surrogate"),
        (_entry("0, " + str(2**70)), "which no tensor has"),
        (_entry(str(2**62) + ", 0"), "which no tensor has"),
        (
            _entry("0, 4194304, 4194304, 4194304"),
            "no tensor has",
        ),
        (_entry("9" * 5000), "isn't valid JSON"),
        ('"a": ' + "[" * 50_000 + "]" * 50_000, "isn't valid JSON"),
    ],
)
def test_headers_of_weights(tmp_path: Path, entry: str, said: str) -> None:
    path, text = tmp_path / "model.safetensors", f"{{{entry}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=said):
        read_header(path)


def test_a_header_larger_than_any(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((90_000_000).to_bytes(8, "little"))
        stream.truncate(90_000_008)
    with pytest.raises(CheckpointError, match="is over 64 MiB of JSON"):
        read_header(path)


def test_a_models_own_settings_keep_their_infinities() -> None:
    """Mamba's config.json has one; a record of ours has none."""
    settings = {"time_step_limit": [0.0, float("inf")], "a": "é"}
    assert json.loads(settings_json(settings)) == settings
    with pytest.raises(ValueError):
        canonical_json(settings)
