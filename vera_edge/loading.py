"""A checkpoint as a transformers model: quietly, offline, and only when it has every tensor the model needs.

transformers itself makes up what is missing or has another shape, and says so in a log.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer

from vera_edge import side_files
from vera_edge.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError
from vera_edge.files import read_json
from vera_edge.merge.config import without_kernels

# What a decoder's exporter reads beside the weights, where it's there.
_JSON = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")

# For every `from_pretrained`: neither a network nor code that comes with a model, and no question about it.
LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_OFFLINE = "HF_HUB_OFFLINE"

_VOCABULARIES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "sentencepiece.bpe.model",
        "spiece.model",
        "tekken.json",
        "vocab.json",
        "vocab.txt",
    }
)


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a decoder lacks a tensor or its tokenizer, or has a tensor of another shape.

    Reads no tensor; says nothing of models that transformers doesn't know.
    """
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not name.endswith(("ForCausalLM", "LMHeadModel")):
        return
    cls = getattr(transformers, name, None)
    if cls is None or checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return
    config = config_of(checkpoint)
    if type(config) is not cls.config_class:
        return
    _check_beside(checkpoint)
    shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.other_names}
    for module, linear in checkpoint.linears.items():
        shapes[f"{module}.weight"] = linear.shape[::-1] if checkpoint.is_conv1d(module) else linear.shape
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    loaded(cls, config, checkpoint, tensors, device_map="meta")


def _check_beside(checkpoint: Checkpoint) -> None:
    folder = checkpoint.path
    if _VOCABULARIES.isdisjoint(side_files.find(folder)):
        raise CheckpointError(f"{folder} holds no tokenizer; save the model's there (save_pretrained)")
    for name in _JSON:
        if (folder / name).is_file():
            read_json(folder / name, CheckpointError)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as cause:  # the tokenizers package raises bare Exception
            raise CheckpointError(f"{path} isn't a tokenizer that can be read: {first_line(cause)}") from None


def loaded(
    cls: Any, config: Any, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], **options: Any
) -> Any:
    """A model of class `cls` in float32 with these tensors and no others; raises CheckpointError."""
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **LOCAL}
    with quiet():
        try:
            model, loading = cls.from_pretrained(None, config=config, state_dict=tensors, **options)
        except (RuntimeError, ValueError) as cause:
            raise CheckpointError(
                f"{checkpoint.path} doesn't fit its config.json: {first_line(cause)}"
            ) from None
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{checkpoint.path} lacks tensor {missing[0]}, which its config.json asks for")
    if wrong := sorted(loading["mismatched_keys"]):
        name, found, asked = wrong[0]
        raise CheckpointError(
            f"tensor {name} of {checkpoint.path} has shape {list(found)}, and its config.json asks for "
            f"{list(asked)}"
        )
    return model


def config_of(checkpoint: Checkpoint, quantized: bool = False) -> Any:
    """Its transformers config; raises CheckpointError when transformers knows none like it.

    quantized: with its quantization_config, for weights as they are stored.
    """
    facts = without_kernels(checkpoint.config)
    if not quantized:
        facts.pop("quantization_config", None)
    model_type = facts.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: transformers {transformers.__version__} has no model type "
            f"{model_type!r}; models that bring their own code aren't run"
        )
    try:
        return transformers.CONFIG_MAPPING[model_type].from_dict(facts)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as cause:
        what = " ".join(str(cause).split())
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} describes no {model_type} model: {what}"
        ) from None


def first_line(cause: Exception) -> str:
    """The first line of another library's message, which may run over many."""
    return str(cause).strip().split("\n")[0].rstrip(".")


@contextmanager
def offline() -> Iterator[None]:
    """Keep huggingface_hub, and what looks things up through it, off the network in this process."""
    # The variable is read once, when the package is imported; it is for processes that start meanwhile.
    before, constant = os.environ.get(_OFFLINE), constants.HF_HUB_OFFLINE
    os.environ[_OFFLINE], constants.HF_HUB_OFFLINE = "1", True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = constant
        if before is None:
            os.environ.pop(_OFFLINE, None)
        else:
            os.environ[_OFFLINE] = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers, PEFT and bitsandbytes off the network, and their talk off the terminal."""
    theirs = transformers.utils.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "peft")]
    levels = [logger.level for logger in loggers]
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
