"""`vera-edge adapt`: an adapter carried from the base it was trained on to the one that is shipped."""

from __future__ import annotations

from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    note,
    out,
    print_json,
    progress_bar,
    projection_rounding_option,
    quiet_option,
    tokenizer_option,
    trained_as_option,
)


@click.command()
@click.argument("base", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.option(
    "--onto", type=FOLDER, required=True, metavar="SHIPPED", help="The same model as it will be shipped."
)
@click.option("-o", "--out", "folder", type=FOLDER, required=True, help="The PEFT folder to write.")
@click.option(
    "--calibration",
    multiple=True,
    metavar="FILE[=SHARE]",
    help="Text to train on: a UTF-8 file like what the adapter is for, and its share of the tokens (half, "
    "unless given); repeat for more. built-in takes the rest, all unless given.",
)
@click.option(
    "--steps", type=int, default=160, show_default=True, help="At most so many windows of 256 tokens."
)
@click.option(
    "--activations",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="int8: round what SHIPPED's integer layers read, as ONNX Runtime does.",
)
@projection_rounding_option
@trained_as_option
@tokenizer_option
@click.option(
    "--compute-device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="cpu",
    show_default=True,
    help="What both models run on. auto: the first that is there of cuda, mps, cpu.",
)
@force_option
@quiet_option
@json_option
def adapt(
    base: Path,
    adapter: Path,
    onto: Path,
    folder: Path,
    calibration: tuple[str, ...],
    steps: int,
    activations: str,
    projection_rounding: str | None,
    trained_as: str | None,
    tokenizer: Path | None,
    compute_device: str,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Carry ADAPTER, trained on BASE, to another form of that base, by a short distillation.

    Its lambda vectors, or a LoRA's pairs, are trained towards what the model as trained says to a text,
    beside SHIPPED. A part of the text is held out and judges it: never worse than it began there. Then
    export SHIPPED with OUT, `--mode branch --weights same`.
    """
    with progress_bar(quiet or as_json) as progress:
        made = vera_edge.adapt(
            base,
            adapter,
            onto=onto,
            out=folder,
            calibration=calibration,
            steps=steps,
            activations=activations,
            projection_rounding=projection_rounding,
            trained_as=trained_as,
            tokenizer=tokenizer,
            compute_device=compute_device,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(made.to_dict())
        return
    table = Table(str(made.folder), "", box=SIMPLE_HEAD)
    table.add_column(overflow="fold")
    for name, kl in (("before", made.before), ("after", made.after)):
        table.add_row(f"lost {name}", f"{kl:.4g} nats, {made.share(kl):.1%} of the adapter's effect")
    table.add_row("judged on", f"{made.held_out} held-out tokens")
    table.add_row("trained on", f"{made.tokens} tokens, {made.steps} steps, {made.seconds:.0f} s")
    out().print(table)
    if not made.improved:
        out().print("nothing did better on the held-out text, so its values are those that came")
    elif made.stopped:
        out().print(made.stopped)
    for sentence in made.notes:
        note(sentence)
