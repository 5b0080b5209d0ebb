"""GGUF headers that nobody vouches for: none may take time or memory that its file doesn't."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, VeraEdgeError
from vera_edge.formats import gguf_header

WIDTH = 32


def _model(path: Path, blocks: int = 1, **changes: Any) -> Path:
    """A whole model of one block in float32, some of its metadata changed."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": WIDTH,
        "block_count": blocks,
    }
    facts |= {"attention.head_count": 2}
    for key, value in facts.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in changes.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    writer.add_token_list([b"a", b"b"])

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))

    add("token_embd", 2, WIDTH)
    add("output_norm", WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        add(f"blk.0.{name}", WIDTH, WIDTH)
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{name}", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _header(fields: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + fields + tensors


def _tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_ONE = _tensor("a", 8)

WRONG = {
    "nothing": b"",
    "another magic": b"GGUX" + bytes(100),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "more tensors than bytes": _header(counts=(1 << 19, 0)),
    "tensors without end": _header(counts=(1 << 63, 0)),
    "fields without end": _header(counts=(0, 1 << 63)),
    "a name without end": _header(struct.pack("<Q", 1 << 62), counts=(0, 1)),
    "a text without end": _header(_text("a") + struct.pack("<IQ", 8, 1 << 62), counts=(0, 1)),
    "a list without end": _header(_text("a") + struct.pack("<IIQ", 9, 0, 1 << 62), counts=(0, 1)),
    "a list past the file": _header(_text("a") + struct.pack("<IIQ", 9, 12, 1 << 20), counts=(0, 1)),
    "a list of lists": _header(_text("a") + struct.pack("<II", 9, 9) * 100, counts=(0, 1)),
    "an unknown value": _header(_text("a") + struct.pack("<IQ", 77, 0), counts=(0, 1)),
    "a key twice": _header((_text("a") + struct.pack("<IB", 0, 1)) * 2, counts=(0, 2)),
    "a key that is no text": _header(struct.pack("<Q", 2) + b"\xed\xa0" + bytes(8), counts=(0, 1)),
    "an alignment of 0": _header(_text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)),
    "an alignment of 3": _header(_text("general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)),
    "an alignment of 2**31": _header(
        _text("general.alignment") + struct.pack("<II", 4, 1 << 31), counts=(0, 1)
    ),
    "an alignment that is text": _header(
        _text("general.alignment") + struct.pack("<I", 8) + _text("x"), counts=(0, 1)
    ),
    "no dimension": _header(tensors=_tensor("a"), counts=(1, 0)),
    "100 dimensions": _header(tensors=_tensor("a", *[1] * 100), counts=(1, 0)),
    "2**32 - 1 dimensions": _header(tensors=_text("a") + struct.pack("<I", 2**32 - 1), counts=(1, 0)),
    "an empty tensor": _header(tensors=_tensor("a", 0, 8), counts=(1, 0)),
    "a tensor of 2**70": _header(tensors=_tensor("a", 1 << 35, 1 << 35), counts=(1, 0)),
    "a tensor past the end": _header(tensors=_tensor("a", 1 << 40), counts=(1, 0)) + bytes(64),
    "an offset past the end": _header(tensors=_tensor("a", 8, offset=1 << 63), counts=(1, 0)) + bytes(64),
    "an unknown type": _header(tensors=_tensor("a", 8, kind=9999), counts=(1, 0)) + bytes(64),
    "half a block": _header(tensors=_tensor("a", 8, kind=2), counts=(1, 0)) + bytes(64),
    "a tensor twice": _header(tensors=_ONE + _tensor("a", 8, offset=32), counts=(2, 0)) + bytes(160),
    "tensors over each other": _header(tensors=_ONE + _tensor("b", 8), counts=(2, 0)) + bytes(160),
    "a tensor off its place": _header(tensors=_tensor("a", 8, offset=3), counts=(1, 0)) + bytes(160),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(WRONG[name])
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CheckpointError, match="isn't a sound GGUF file") as caught:
        gguf_header.read(path)
    assert time.process_time() - start < 10  # the first one imports the gguf package
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_it_reads_what_the_gguf_package_reads(tmp_path: Path) -> None:
    import gguf

    path = _model(tmp_path / "a.gguf", general__name="a model", llama__scale=0.5, llama__flag=True)
    header, theirs = gguf_header.read(path), gguf.GGUFReader(path)
    assert header.metadata == {
        key: field.contents()
        for key, field in theirs.fields.items()
        if not key.startswith("GGUF.") and field.types[0].name != "ARRAY"
    }
    assert [(t.name, t.kind, t.shape, t.start, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]), int(t.data_offset), t.n_bytes)
        for t in theirs.tensors
    ]
    assert Checkpoint.open(path).config["num_hidden_layers"] == 1


@pytest.mark.parametrize("blocks", [12, 20_000, 200_000, 2**32 - 1])
def test_a_claim_of_many_blocks_is_a_sentence_at_once(blocks: int, tmp_path: Path) -> None:
    """20 000 blocks claimed by 2 KB took 16 s and 1 GB."""
    path = _model(tmp_path / "a.gguf", blocks)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"claims {blocks} blocks and holds 11 tensors"):
        Checkpoint.open(path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama__attention__layer_norm_rms_epsilon", "small"),
        ("llama__attention__layer_norm_rms_epsilon", float("nan")),
        ("llama__rope__freq_base", -1.0),
        ("llama__attention__head_count_kv", "two"),
        ("tokenizer__ggml__bos_token_id", "one"),
    ],
)
def test_metadata_of_the_wrong_kind(key: str, value: Any, tmp_path: Path) -> None:
    path = _model(tmp_path / "a.gguf", **{key: value})
    with pytest.raises(CheckpointError, match="metadata"):
        Checkpoint.open(path)


def test_any_byte_changed_gives_a_model_or_a_sentence(tmp_path: Path) -> None:
    whole, path = _model(tmp_path / "a.gguf").read_bytes(), tmp_path / "b.gguf"
    draw = np.random.default_rng(5)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in draw.integers(0, 1600, draw.integers(1, 4)):
            data[place] = draw.choice(np.array([0, 1, 0x7F, 0x80, 0xFF, int(draw.integers(256))]))
        path.write_bytes(data)
        try:
            Checkpoint.open(path)
        except VeraEdgeError:
            refused += 1
    assert refused > 100
