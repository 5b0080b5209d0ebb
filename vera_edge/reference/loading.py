"""A checkpoint as a transformers model: quietly, offline, and only when it has every tensor the model needs.

transformers itself makes up what is missing or has another shape, and says so in a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as.config import without_kernels
from vera_edge.errors import CheckpointError
from vera_edge.formats import checks
from vera_edge.quiet import first_line, quiet
from vera_edge.storage.side_files import SideFiles
from vera_edge.tasks import task as tasks
from vera_edge.text import tokenizer

# What a decoder's exporter reads beside the weights, where it's there.
_JSON = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json")

# For every `from_pretrained`: neither a network nor code that comes with a model, and no question about it.
LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a decoder lacks a tensor or its tokenizer, or has a tensor of another shape.

    Reads no tensor; says nothing of models that transformers doesn't know.
    """
    name = tasks.architecture(checkpoint.config)
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        return
    cls = getattr(transformers, name, None)
    if cls is None or checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return
    config = config_of(checkpoint)
    if type(config) is not cls.config_class:
        return
    _check_files(checkpoint.files, checkpoint)
    shapes = {name: checkpoint.tensors[name].shape for name in checkpoint.other_names}
    for module, linear in checkpoint.linears.items():
        shapes[f"{module}.weight"] = linear.shape[::-1] if checkpoint.is_conv1d(module) else linear.shape
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    loaded(cls, config, checkpoint, tensors, device_map="meta")


def _check_files(files: SideFiles, checkpoint: Checkpoint) -> None:
    for name in _JSON:
        files.json(name)
    if not files.has_vocabulary:
        raise CheckpointError(
            f"{checkpoint.path} holds no tokenizer; save the model's there (save_pretrained)"
        )
    tokenizer.read(files, checkpoint.config)


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
        facts = checks.without_quantization(facts)
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
