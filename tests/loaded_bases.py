"""Bases as transformers and bitsandbytes load them, saved: what ours are held against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.storage.tensors import RawTensor, TensorFolder

# Options of BitsAndBytesConfig by the words of --trained-as that stand for them.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4,double,compute=bf16": tiny.four_bit("nf4", compute="bfloat16"),
    "fp4,double": tiny.four_bit("fp4"),
    "nf4,storage=bf16": tiny.four_bit("nf4", double=False, bnb_4bit_quant_storage="bfloat16"),
    "fp4,storage=fp32": tiny.four_bit("fp4", double=False, bnb_4bit_quant_storage="float32"),
    "nf4,double,storage=fp16,compute=fp16": tiny.four_bit(
        "nf4", compute="float16", bnb_4bit_quant_storage="float16"
    ),
    "nf4,skip=lm_head,skip=v_proj,skip=model.layers.1.mlp": {
        **tiny.four_bit("nf4", double=False),
        "llm_int8_skip_modules": ["lm_head", "v_proj", "model.layers.1.mlp"],
    },
    "int8": {"load_in_8bit": True},
    "int8,skip=down_proj,skip=lm_head": {
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["down_proj", "lm_head"],
    },
}


def written(source: Path, folder: Path, dtype: str, auto: str = "", **options: Any) -> Checkpoint:
    """The truth: what transformers and bitsandbytes make of `source` when they load it, saved."""
    import torch
    import transformers

    config = json.loads((source / "config.json").read_text())
    cls = getattr(transformers, auto or config["architectures"][0])
    settings = transformers.BitsAndBytesConfig(**options) if options else None
    loaded = cls.from_pretrained(
        source, dtype=getattr(torch, dtype), device_map="cpu", quantization_config=settings
    )
    loaded.save_pretrained(folder)
    return Checkpoint.open(folder)


def plain(tensor: RawTensor, name: str) -> tuple[str, tuple[int, ...], bytes] | dict[str, Any]:
    """All there is of a tensor; a quant_state, whose text may end in blanks, by what it says."""
    if "quant_state" in name:
        state: dict[str, Any] = json.loads(tensor.data.tobytes())
        return state
    return tensor.dtype, tensor.shape, tensor.data.tobytes()


def assert_same(ours: TensorFolder, theirs: TensorFolder) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        assert plain(ours.read(name), name) == plain(theirs.read(name), name), name
        assert b"".join(piece.tobytes() for piece in ours.pieces(name)) == ours.read(name).data.tobytes()


def rewrite(source: Path, folder: Path, tensors: Mapping[str, Any]) -> Path:
    """The model in `source` with other tensors."""
    from safetensors.torch import save_file

    shutil.copytree(source, folder)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found
