"""A base that isn't whole is refused before it is exported, for transformers would make up the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError
from vera_edge.exporting import target
from vera_edge.reference.loading import check_complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3, "layer_types": None}, r"lacks tensor model\.layers\.2"),
        ({"tie_word_embeddings": False}, r"lacks tensor lm_head\.weight"),
        ({"vocab_size": 385}, r"embed_tokens\.weight of .* has shape \[384, 64\], .* asks for \[385, 64\]"),
        ({"num_attention_heads": "four"}, "describes no llama model"),
    ],
)
def test_nothing_is_exported_whose_values_transformers_would_make_up(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama.nf4, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        target.export(folder, [(tiny_adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "holds no tokenizer"),
        ("tokenizer.json", "{}", r"tokenizer\.json isn't a tokenizer"),
        ("tokenizer_config.json", "{{", r"tokenizer_config\.json isn't valid JSON"),
        ("generation_config.json", "[]", "holds a JSON list where an object belongs"),
    ],
)
def test_what_lies_beside_the_weights_is_read_first(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama.nf4, tmp_path / "base"))
    check_complete(Checkpoint.open(folder))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        check_complete(Checkpoint.open(folder))


def test_every_kind_of_base_is_whole(
    tiny_llama: tiny.TinyLlama, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized, sharded, of Conv1D: by shapes alone, without a tensor's bytes."""
    for folder in (tiny_llama.fp32, tiny_llama.int8, tiny_llama.fp4, tiny_llama.sharded, tiny_gpt2):
        checkpoint = Checkpoint.open(folder)
        with monkeypatch.context() as changed:
            changed.setattr(type(checkpoint.tensors), "read", None)
            check_complete(checkpoint)


OFFLINE = """
import socket, sys
asked = []
def refused(*words, **more):
    asked.append(words)
    raise OSError("this test has no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
import huggingface_hub
from vera_edge.quiet import offline, quiet
from vera_edge_onnx.decoder import build
from vera_edge_onnx.encoder import drawing
def look_up():
    try:
        huggingface_hub.HfApi().model_info("nobody/nothing")
    except Exception:
        pass
    return len(asked)
with offline():
    within = look_up()
with quiet():
    loading = look_up()
with build._quiet():  # while the GenAI builder works, and transformers' exporter
    building = look_up()
with drawing._quiet():
    exporting = look_up()
print(within, loading, building, exporting, huggingface_hub.is_offline_mode(), look_up() > 0)
"""


def test_nothing_is_looked_up_while_a_model_loads(tmp_path: Path) -> None:
    """huggingface_hub reads its variable once, at import, so that setting it later has no effect."""
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment | {"HF_HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Outside it is as it was before: the last look-up tried.
    assert done.stdout.split() == ["0"] * 4 + ["False", "True"], done.stdout + done.stderr
