"""`vera_edge.quantize`: a quantized base, that of a training run or one to train on, from the float one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vera_edge.api.arguments import BUILT_IN, StrPath, Texts, mixture, path_or_none
from vera_edge.errors import PlanError
from vera_edge.merging import quantize as quantizing
from vera_edge.merging.quantize import Quantized
from vera_edge.progress import Progress, silent

__all__ = ["Quantized", "quantize"]

GPTQ = "gptq"


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
    group: int | None = None,
    asymmetric: bool | None = None,
    calibration: Texts | None = None,
    method: str | None = None,
    effort: str | None = None,
    compute_device: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Quantized:
    """Write a quantized base: the one that an adapter was trained on, or integers to train on and ship.

    Training with BitsAndBytesConfig quantizes a float model in memory, and nobody saves that. nf4, fp4 and
    int8 make the same bytes in numpy, one layer at a time. gptq makes integers by compensated rounding, the
    very ones that `export` with weights "same" lets ONNX Runtime multiply with: train on them
    (`vera_edge.training.load`), and nothing is lost in shipping.

    Args:
        base: the float model's folder; for gptq also one in another quantized format.
        out: the folder to write, whole or not at all.
        to: nf4 or fp4 (load_in_4bit=True), int8 (load_in_8bit=True), gptq; None where `like` tells.
        like: an adapter trained on it: must fit, and what its folder tells needn't be said.
        double_quant: bnb_4bit_use_double_quant: the scales are quantized too.
        compute_dtype: bnb_4bit_compute_dtype: float32 (the default), bfloat16, float16.
        quant_storage: bnb_4bit_quant_storage: uint8 (the default), float32, bfloat16, float16.
        dtype: dtype= of from_pretrained, which weights are quantized from; None: config.json's.
        skip: llm_int8_skip_modules: modules left in floats.
        group: of gptq: inputs that share a scale, 32 (the default), 64 or 128.
        asymmetric: of gptq: with a zero point for each group (the default), or without.
        calibration: of gptq: text to calibrate on: a UTF-8 file, several, or {file: share of the tokens};
            "built-in" text takes the rest, and all of it where none is given.
        method: of gptq: how to round: rtn, search, hqq or gptq (the default).
        effort: of gptq: what search and gptq spend: quick, default or thorough.
        compute_device: of gptq: what they compute on: cpu (the default), cuda, mps, or auto.
        force: replace `out` where it exists.
        progress: called with what is done, how much of it, and of how much (bytes).

    Returns:
        A Quantized: the folder, its size in bytes and its digest, how many layers were quantized, and
        `trained_as`, the same in words that the other functions take; of gptq None.

    Raises:
        CheckpointError: the base can't be quantized.
        MismatchError: the adapter doesn't fit it.
        DataError: the calibration text can't be used.
        PlanError: nothing says what to quantize to, or an option is of another format.
        OutputError: `out` exists or can't be written.

    Example:
        >>> made = vera_edge.quantize("model", out="quantized", to="nf4", double_quant=True)
        >>> made.trained_as, made.layers
        ('nf4,double', 14)
    """
    of_gptq = {
        "group": group,
        "asymmetric": asymmetric,
        "calibration": calibration,
        "method": method,
        "effort": effort,
        "compute_device": compute_device,
    }
    of_loading = {
        "like": like,
        "double_quant": double_quant,
        "compute_dtype": compute_dtype,
        "quant_storage": quant_storage,
        "dtype": dtype,
        "skip": skip or None,
    }
    if to != GPTQ:
        _refuse(of_gptq, "gptq, whose integers are calibrated")
        asked = quantizing.Asked(to, dtype, double_quant, compute_dtype, quant_storage, tuple(skip))
        return quantizing.to_folder(Path(base), Path(out), asked, path_or_none(like), force, progress)
    _refuse(of_loading, "what bitsandbytes quantizes to on loading: nf4, fp4 and int8")
    from vera_edge.rounding import integer_base
    from vera_edge.rounding.weight_rounding import Rounding

    form = integer_base.IntegerForm(32 if group is None else group, asymmetric is False)
    text = mixture(BUILT_IN if calibration is None else calibration)
    rounding = Rounding(method, text, effort=effort, device=compute_device or Rounding.device)
    return integer_base.to_folder(Path(base), Path(out), form, rounding, force, progress)


def _refuse(options: dict[str, Any], of: str) -> None:
    """Raise PlanError where an option was given that another format has."""
    for name, value in options.items():
        if value is not None:
            raise PlanError(f"{name} is an option of {of}; leave it out, or choose another format")
