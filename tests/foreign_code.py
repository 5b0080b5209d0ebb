"""Folders of Python files under names that somebody would import; each leaves a mark when it is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What is imported sooner or later by what a command uses, by Python itself, by transformers of a model that
# brings its own code, and by pytest.
NAMES = (
    "numpy",
    "click",
    "rich",
    "jinja2",
    "tokenizers",
    "safetensors",
    "onnxruntime",
    "onnx",
    "torch",
    "transformers",
    "peft",
    "ray",
    "pydantic",
    "json",
    "hashlib",
    "subprocess",
    "tempfile",
    "__future__",
    "multiprocessing",
    "pickle",
    "sitecustomize",
    "usercustomize",
    "vera_edge_onnx",
    "modeling_x",
    "configuration_x",
    "tokenization_x",
    "conftest",
)
_AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModel": "modeling_x.XModel",
    "AutoModelForCausalLM": "modeling_x.XModel",
    "AutoModelForSequenceClassification": "modeling_x.XModel",
}


def plant(folder: Path, marks: Path) -> Path:
    """Put the files into `folder`; one that is run writes its name and its process into `marks`."""
    marks.mkdir(exist_ok=True)
    for name in NAMES:
        write = f"open({str(marks / name)!r}, 'a').write(__file__ + chr(10))"
        (folder / f"{name}.py").write_text(f"{write}\nraise ImportError('this is not {name}')\n")
    return folder


def name_own_code(folder: Path) -> Path:
    """Let the model's settings in `folder` ask for those files, as a model that brings its own code does."""
    _add(folder / "config.json", auto_map=_AUTO_MAP)
    tokenizer = ["tokenization_x.XTokenizer", "tokenization_x.XTokenizer"]
    _add(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": tokenizer})
    return folder


def _add(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def marks_in(marks: Path) -> Sequence[str]:
    """What was run."""
    return sorted(path.name for path in marks.iterdir())
