"""`vera_edge.quantize`: the quantized base of a training run, from the float one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.api.arguments import StrPath, path_or_none
from vera_edge.merging import quantize as quantizing
from vera_edge.merging.quantize import Quantized
from vera_edge.progress import Progress, silent

__all__ = ["Quantized", "quantize"]


def quantize(
    base: StrPath,
    *,
    out: StrPath,
    to: str | None = None,
    like: StrPath | None = None,
    double_quant: bool | None = None,
    compute_dtype: str | None = None,
    quant_storage: str | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Quantized:
    """Write the base that an adapter was trained on, when it was quantized as it was loaded.

    Training with BitsAndBytesConfig quantizes a float model in memory, and nobody saves that. This makes the
    same bytes in numpy, one layer at a time.

    Args:
        base: the float model's folder.
        out: the folder to write, whole or not at all.
        to: nf4 or fp4 (load_in_4bit=True), int8 (load_in_8bit=True); None where `like` tells.
        like: an adapter trained on it: must fit, and what its folder tells needn't be said.
        double_quant: bnb_4bit_use_double_quant: the scales are quantized too.
        compute_dtype: bnb_4bit_compute_dtype: float32 (the default), bfloat16, float16.
        quant_storage: bnb_4bit_quant_storage: uint8 (the default), float32, bfloat16, float16.
        dtype: dtype= of from_pretrained, which weights are quantized from; None: config.json's.
        skip: llm_int8_skip_modules: modules left in floats.
        force: replace `out` where it exists.
        progress: called with what is done, how much of it, and of how much (bytes).

    Returns:
        A Quantized: the folder, its size in bytes and its digest, how many layers were quantized, and
        `trained_as`, the same in words that the other functions take.

    Raises:
        CheckpointError: the base can't be quantized.
        MismatchError: the adapter doesn't fit it.
        PlanError: nothing says what to quantize to.
        OutputError: `out` exists or can't be written.

    Example:
        >>> made = vera_edge.quantize("model", out="quantized", to="nf4", double_quant=True)
        >>> made.trained_as, made.layers
        ('nf4,double', 14)
    """
    asked = quantizing.Asked(to, dtype, double_quant, compute_dtype, quant_storage, tuple(skip))
    return quantizing.to_folder(Path(base), Path(out), asked, path_or_none(like), force, progress)
