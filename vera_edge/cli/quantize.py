"""`vera-edge quantize`: a quantized base, of a training run or to train on, from the float folder."""

from __future__ import annotations

from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    effort_option,
    force_option,
    json_option,
    method_option,
    out,
    print_json,
    progress_bar,
    quiet_option,
)

_DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.argument("base", type=FOLDER)
@click.option("-o", "--out", "folder", type=FOLDER, required=True, help="The folder to write.")
@click.option(
    "--to",
    type=click.Choice(["nf4", "fp4", "int8", "gptq"]),
    help='nf4: load_in_4bit=True with bnb_4bit_quant_type="nf4". fp4: load_in_4bit=True alone. int8: '
    "load_in_8bit=True. gptq: 4-bit integers to train on, which an export ships as they are.",
)
@click.option(
    "--like",
    type=FOLDER,
    metavar="ADAPTER",
    help="An adapter trained on it: must fit, and what its folder tells needn't be said.",
)
@click.option(
    "--double-quant/--no-double-quant",
    default=None,
    help="bnb_4bit_use_double_quant: the scales are quantized too.  [default: no]",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(_DTYPES),
    help="bnb_4bit_compute_dtype. No weight depends on it, PEFT's projections do.  [default: float32]",
)
@click.option(
    "--quant-storage",
    type=click.Choice(["uint8", *_DTYPES]),
    help="bnb_4bit_quant_storage: the dtype that the 4-bit bytes are kept under.  [default: uint8]",
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    help="dtype= of from_pretrained, which weights are quantized from.  [default: config.json's; "
    "transformers 4 took float16]",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="MODULE",
    help="llm_int8_skip_modules: a module left in floats; repeat for more. Only those named are, then.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    help="Of gptq: inputs that share a scale.  [default: 32]",
)
@click.option(
    "--asymmetric/--symmetric",
    default=None,
    help="Of gptq: with a zero point for each group, or without.  [default: asymmetric]",
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="FILE[=SHARE]",
    help="Of gptq: text to calibrate on: a UTF-8 file like what will be trained, and its share of the tokens "
    "(half, unless given); repeat for more. built-in takes the rest.  [default: built-in]",
)
@method_option
@effort_option
@click.option(
    "--compute-device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Of gptq: what it computes on. auto: the first that is there of cuda, mps, cpu.  [default: cpu]",
)
@force_option
@quiet_option
@json_option
def quantize(
    base: Path,
    folder: Path,
    to: str | None,
    like: Path | None,
    double_quant: bool | None,
    compute_dtype: str | None,
    quant_storage: str | None,
    dtype: str | None,
    skip: tuple[str, ...],
    group: str | None,
    asymmetric: bool | None,
    calibration: tuple[str, ...],
    method: str | None,
    effort: str | None,
    compute_device: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the base that an adapter was trained on, when it was quantized as it was loaded.

    Training with BitsAndBytesConfig quantizes a float model in memory, and nobody saves that. This makes the
    same bytes from BASE, the float model's folder, in numpy, one layer at a time. Say what the training said
    it was; what it left out has the default of BitsAndBytesConfig here too.

    Commands that take --trained-as do the same in passing, and write nothing.

    --to gptq is for what isn't trained yet: it makes integers by compensated rounding, the very ones that
    `export --weights same` lets ONNX Runtime multiply with. vera_edge.training.load gives them to PEFT.
    """
    with progress_bar(quiet or as_json, in_bytes=("quantizing",)) as progress:
        made = vera_edge.quantize(
            base,
            out=folder,
            to=to,
            like=like,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            quant_storage=quant_storage,
            dtype=dtype,
            skip=skip,
            group=None if group is None else int(group),
            asymmetric=asymmetric,
            calibration=calibration or None,
            method=method,
            effort=effort,
            compute_device=compute_device,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(made.to_dict())
        return
    table = Table(str(made.folder), "", box=SIMPLE_HEAD)
    table.add_column(overflow="fold")
    if made.call is not None:
        table.add_row("as if loaded with", made.call)
        table.add_row("in one word", f"--trained-as {made.trained_as}")
    else:
        table.add_row("stored as", made.stored)
    table.add_row("quantized", f"{made.layers} linear layers, from {made.dtype}")
    table.add_row("left in floats", ", ".join(made.kept) or "no linear layer")
    table.add_row("size", f"{made.size / 1e6:,.1f} MB")
    table.add_row("digest", made.digest)
    out().print(table)
    for note in made.notes:
        out().print(note)
