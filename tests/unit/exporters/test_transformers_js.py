"""What Transformers.js reads of an exported folder: the files by their names, and the chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests import tiny, tiny_encoder
from vera_edge.device.deploy import install
from vera_edge.device.runtime.chat import BundleText
from vera_edge.exporting import frozen_graph, target

KEY = "transformers.js_config"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"}]


def fetched(folder: Path, name: str = "model") -> list[str]:
    """The files of a model that Transformers.js 4 fetches by itself, as its sources name them."""
    told = json.loads((folder / "config.json").read_text())[KEY]
    assert told["dtype"] == "fp32"  # the suffix of whose files is empty
    chunks = told["use_external_data_format"].get(f"{name}.onnx", 0)
    return [f"{name}.onnx_data" + (f"_{number}" if number else "") for number in range(chunks)]


def read(folder: Path, name: str = "model") -> set[str]:
    """The data files that the graph itself names."""
    model = onnx.load(folder / "onnx" / f"{name}.onnx", load_external_data=False)
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


@pytest.mark.parametrize(
    ("mode", "weights", "options"),
    [
        ("merged", "fp32", {}),
        ("branch", "int4", {}),
        ("branch", "int8", {"origin": "seed"}),
        ("merged", "nf4", {"run": "int8"}),
        ("branch", "nf4", {"run": "int8", "origin": "seed"}),
    ],
)
def test_a_browser_fetches_the_files_that_the_graph_reads(
    mode: str,
    weights: str,
    options: dict[str, str],
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    """Those too that are made on installing: what is served is what was installed."""
    out = tmp_path / "out"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode=mode, weights=weights, options=options)
    assert set(fetched(out)) == read(out)
    install.install(out, tmp_path / "models")
    installed = tmp_path / "models" / "current"
    assert all((installed / "onnx" / name).is_file() for name in fetched(installed))
    if mode == "branch":
        frozen_graph.freeze(out, "default", "law")
        assert fetched(out, "model_law") == []  # its data has the first graph's name; see docs/consumers.md


def test_an_encoder_too(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    target.export(base, [(adapter, 1.0)], tmp_path / "out", weights="int8")
    assert set(fetched(tmp_path / "out")) == read(tmp_path / "out")
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def rendered(folder: Path) -> str:
    """By transformers, from tokenizer_config.json alone."""
    from transformers import PreTrainedTokenizerFast

    for path in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*")):
        path.unlink()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    tools: Any = tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, tools=[{"name": "f"}]
    )
    return f"{found}{tools}"


@pytest.mark.parametrize("place", ["a file", "the config", "several files", "both"])
def test_the_chat_template_is_in_the_tokenizers_config(
    place: str, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    adapter = tiny.make_adapter(base, tmp_path / "adapter", targets=("q_proj",))
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if place in ("the config", "both"):
        told = tiny.CHAT_TEMPLATE if place == "the config" else "not this one"
        path.write_text(json.dumps(config | {"chat_template": told}))
    if place == "the config":
        (base / "chat_template.jinja").unlink()
    if place == "several files":
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ tools | tojson }}")
    out = tmp_path / "out"
    target.export(base, [(adapter, 1.0)], out)
    text = BundleText(out)
    arguments = {"tools": [{"name": "f"}]}
    expected = text.render(MESSAGES) + text.render(MESSAGES, arguments)
    assert ("TOOLS" in expected) is (place == "several files") and "<|im_start|>user\nHi" in expected
    assert rendered(out) == expected
