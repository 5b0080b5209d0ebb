"""`vera-edge run`: text from an exported folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

import vera_edge
from vera_edge.cli.generation_options import takes_generation
from vera_edge.cli.show import (
    FOLDER,
    fast_option,
    four_bit_option,
    huge_pages_option,
    json_option,
    out,
    print_json,
    reread_option,
    resident_option,
    tell,
)

_FOR_ENCODERS = {
    "bundle",
    "prompt",
    "adapter",
    "threads",
    "fast",
    "reread",
    "four_bit",
    "huge_pages",
    "as_json",
}


@click.command()
@click.argument("bundle", type=FOLDER)
@click.argument("prompt")
@click.option(
    "--adapter", default="default", metavar="FILE|NAME|none", help="Branch mode: the adapter to run."
)
@takes_generation(max_tokens=256)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; all cores by default.")
@fast_option
@reread_option
@four_bit_option
@resident_option
@huge_pages_option
@json_option
def run(
    bundle: Path,
    prompt: str,
    adapter: str,
    system: str | None,
    threads: int | None,
    raw: bool,
    fast: bool,
    reread: bool,
    four_bit: Literal["expanded", "int8", "kept"] | None,
    resident: bool,
    huge_pages: bool,
    as_json: bool,
    **sampling: object,
) -> None:
    """Generate text from BUNDLE for PROMPT (- reads it from the standard input), without torch.

    The text goes to the standard output as it is generated. An encoder gives PROMPT's embedding as JSON, or
    its classes with their probabilities.
    """
    if prompt == "-" and sys.stdin is None:
        raise click.UsageError("there is no standard input to read the prompt from")
    text = sys.stdin.read() if prompt == "-" else prompt
    if vera_edge.read_manifest(bundle).kind == "encoder":
        _refuse_sampling(click.get_current_context())
    model = vera_edge.open_bundle(
        bundle,
        adapter=adapter,
        threads=threads,
        fast=fast,
        reread=reread,
        four_bit=four_bit,
        resident=resident,
        huge_pages=huge_pages,
        tell=tell,
    )
    verified: dict[str, Any] = {} if model.verified is None else {"verified": model.verified.to_dict()}
    if not isinstance(model, vera_edge.Session):
        _encode(model, text, as_json, verified)
        return
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}] if system else text
    generation = model.generate(messages, raw=raw, **sampling)  # type: ignore[arg-type]
    pieces = []
    for piece in generation:
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if as_json:
        print_json(generation.summary() | {"text": "".join(pieces)} | verified)
    else:
        click.echo()


def _refuse_sampling(ctx: click.Context) -> None:
    for parameter in sorted(ctx.command.params, key=lambda parameter: parameter.name or ""):
        name = parameter.name or ""
        if name not in _FOR_ENCODERS and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} is for models that generate text")


def _encode(encoder: vera_edge.Encoder, text: str, as_json: bool, verified: dict[str, Any]) -> None:
    if not encoder.labels:
        vector = [float(f"{value:.7g}") for value in encoder.embed([text])[0].tolist()]
        print_json({"embedding": vector} | (verified if as_json else {}))
        return
    shares = encoder.probabilities([text])[0].tolist()
    found = dict(sorted(zip(encoder.labels, shares, strict=True), key=lambda pair: -pair[1]))
    if as_json:
        print_json({"classes": found} | verified)
        return
    for label, share in found.items():
        out().print(f"{share:.4f}  {label}")
