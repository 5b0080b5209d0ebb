"""How a model of either side reads a text: its tokenizer, the tokens that fit, how it pools hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.base import trained_files
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError
from vera_edge.storage import side_files
from vera_edge.tasks import task as tasks
from vera_edge.text import tokenizer as tokenizers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vera_edge.device.runtime.pooling import Pooling


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """Its tokenizer; None where its folders hold none. Raises CheckpointError when there's a broken one."""
    files = checkpoint.files
    return tokenizers.read(files, checkpoint.config) if files.has_vocabulary else None


def pooling_of(checkpoint: Checkpoint) -> Pooling | None:
    """How its files say that embeddings are made; None for a model that gives none."""
    if tasks.of(checkpoint.config).gives != tasks.EMBEDDINGS:
        return None
    from vera_edge.device.runtime import pooling

    folder = checkpoint.files.folders.get(side_files.MODULES)
    return pooling.Pooling() if folder is None else pooling.read(folder)


def exported_tokenizer(folder: Path) -> Tokenizer | None:
    """A bundle's tokenizer; None where it has none."""
    files = trained_files.gather(folder)
    return tokenizers.read(files, {}) if tokenizers.FAST in files else None


def check_measurable(checkpoint: Checkpoint) -> None:
    """Raise DataError for a model of images or sound, which no text measures."""
    name, takes = tasks.architecture(checkpoint.config), tasks.main_input(checkpoint.config)
    if takes != "input_ids":
        raise DataError(
            f"{checkpoint.path} is a {name}, which takes {takes}, and drift is measured on text; compare its "
            "outputs in ONNX Runtime itself"
        )


def context_of(checkpoint: Checkpoint) -> int | None:
    """The tokens of the longest text that the model has positions for; None where it doesn't say."""
    config = checkpoint.config
    found = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(found, int) or tasks.of(config).gives == tasks.TEXT:
        return found if isinstance(found, int) else None
    from vera_edge.device.runtime.encoder import SHIFTED  # onnxruntime comes with it

    padding = config.get("pad_token_id")
    return found - padding - 1 if config.get("model_type") in SHIFTED and type(padding) is int else found
