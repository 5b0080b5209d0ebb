"""What commands share: the progress bar, JSON output, common options. stdout is data, stderr is talk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from vera_edge import printable
from vera_edge import progress as progress_protocol

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)  # existence is the library's to judge, in its own sentence
json_option: Callable[[F], F] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for scripts."
)
prompt_cache_option: Callable[[F], F] = click.option(
    "--prompt-cache",
    default="64MB",
    show_default=True,
    metavar="SIZE",
    help="Memory for prompts: what later ones begin with alike is computed once.",
)
fast_option: Callable[[F], F] = click.option(
    "--fast", is_flag=True, help="Don't look at the content of files over 64 MiB before they run."
)
reread_option: Callable[[F], F] = click.option(
    "--reread", is_flag=True, help="Read also what was read once and hasn't been written to since."
)
four_bit_option: Callable[[F], F] = click.option(
    "--four-bit",
    type=click.Choice(["expanded", "int8", "kept"]),
    help="How NF4 and FP4 weights run: expanded to int8 blocks in memory, the same with activations rounded "
    "to int8, or kept, exactly and slowly: the default where the bundle's max_kl is under 0.005.",
)
resident_option: Callable[[F], F] = click.option(
    "--resident",
    is_flag=True,
    help="Branch mode: let the adapter live in the graph; a little faster, with the same text.",
)
huge_pages_option: Callable[[F], F] = click.option(
    "--huge-pages",
    is_flag=True,
    help="Move the weights to pages of 2 MB: a slower start, faster tokens (Linux 6.1 and later).",
)
force_option: Callable[[F], F] = click.option("--force", is_flag=True, help="Replace an existing output.")
projection_rounding_option: Callable[[F], F] = click.option(
    "--projection-rounding", help="What the projections were rounded to: float32, bfloat16, float16."
)


trained_as_option: Callable[[F], F] = click.option(
    "--trained-as",
    metavar="SPEC",
    help="How a base in floats was loaded in training, when it was never saved so: nf4, fp4 (what "
    "load_in_4bit=True alone is), int8, float, bf16, fp16, fp32; after nf4 and fp4, with commas: double, "
    "compute=bf16, storage=bf16; after any, dtype=bf16 and skip=MODULE.",
)
method_option: Callable[[F], F] = click.option(
    "--method",
    type=click.Choice(["rtn", "search", "hqq", "gptq"]),
    help="How to round: to nearest, by searched scales, by HQQ, or compensated (the default for 4 bits).",
)
effort_option: Callable[[F], F] = click.option(
    "--effort",
    type=click.Choice(["quick", "default", "thorough"]),
    help="How much to spend on search and gptq; unless given, default.",
)
calibration_option: Callable[[F], F] = click.option(
    "--calibration",
    multiple=True,
    metavar="FILE[=SHARE]",
    help="Text to calibrate search, gptq and static activations on: a UTF-8 file like what the adapter is "
    "for, and its share of the tokens (half, unless given); repeat for more. built-in takes the rest, all "
    "unless given.",
)
compute_device_option: Callable[[F], F] = click.option(
    "--compute-device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="cpu",
    show_default=True,
    help="What search and gptq compute on. auto: the first that is there of cuda, mps, cpu.",
)
recover_option: Callable[[F], F] = click.option(
    "--recover",
    default="",
    metavar="PARTS",
    callback=lambda ctx, param, value: tuple(part.strip() for part in value.split(",") if part.strip()),
    help="Fit to the rounded base, with commas: a branch's lambda_b, lambda_d; low-rank=RANK, bias.",
)
plan_option: Callable[[F], F] = click.option(
    "--plan", "plan_file", type=FOLDER, metavar="FILE", help="Do what a plan says (vera-edge plan)."
)
tokenizer_option: Callable[[F], F] = click.option(
    "--tokenizer",
    type=FOLDER,
    metavar="FOLDER",
    help="Take tokenizer, chat template and generation settings from here, not from ADAPTER or BASE.",
)
quiet_option: Callable[[F], F] = click.option("-q", "--quiet", is_flag=True, help="No progress bar.")


def weighted_paths(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[Path, float]]:
    """PATH=0.3 as (PATH, 0.3), PATH alone as (PATH, 1.0); a path may hold a = of its own."""
    found = []
    for value in values:
        path, _, weight = value.rpartition("=")
        try:
            found.append((Path(path), float(weight)) if path else (Path(value), 1.0))
        except ValueError:
            found.append((Path(value), 1.0))
    return found


more_adapters_option: Callable[[F], F] = click.option(
    "--adapter",
    "more",
    multiple=True,
    callback=weighted_paths,
    metavar="PATH=WEIGHT",
    help="A further adapter that shares the projections, and what scales its delta; repeat for more.",
)
weight_option: Callable[[F], F] = click.option(
    "--weight", type=float, default=1.0, show_default=True, help="What scales ADAPTER's delta."
)


def out() -> Console:
    """See `console.out`."""
    from vera_edge.cli import console  # and not above: rich would be a fifth of a start

    return console.out()


def err() -> Console:
    """See `console.err`."""
    from vera_edge.cli import console

    return console.err()


def note(sentence: object) -> None:
    """Print a note on stderr, in one line."""
    click.echo(f"note: {printable.line(sentence)}", err=True)


def print_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print one JSON object, or a list of them, on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def tell(sentence: str) -> None:
    """Say a sentence on stderr; above the bar while one is drawn."""
    console = sys.modules.get("vera_edge.cli.console")
    if console is not None and console.drawing:
        console.err().print(sentence)
    else:
        click.echo(printable.lines(sentence), err=True)


def refuse_beside_plan(*names: str) -> None:
    """Raise a usage error when options that the plan decides are given beside --plan."""
    if click.get_current_context().params.get("plan_file") is None:
        return
    if option := given_on_line(*names):
        raise click.UsageError(f"the plan decides {option}; leave it out beside --plan")


def given_on_line(*names: str) -> str | None:
    """The first of these options that the command line has, as it is written there."""
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source == ParameterSource.COMMANDLINE:
            return parameter.opts[0]
    return None


def needs_base(base: Path | None, trained_as: object) -> None:
    """Raise a usage error when --trained-as is given and the base that it speaks of isn't."""
    if base is None and trained_as is not None:
        raise click.UsageError("--trained-as says how the base was loaded; give the base with --base")


def progress_bar(
    quiet: bool = False, in_bytes: Collection[str] = ()
) -> AbstractContextManager[progress_protocol.Progress]:
    """See `console.progress_bar`."""
    from vera_edge.cli import console

    return console.progress_bar(quiet, in_bytes)
