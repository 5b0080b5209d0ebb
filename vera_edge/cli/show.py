"""What commands share: the progress bar, JSON output, common options. stdout is data, stderr is talk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from vera_edge import printable
from vera_edge import progress as progress_protocol

F = TypeVar("F", bound=Callable[..., Any])

_WIDE = 1000  # columns
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


class _Console(Console):
    """A console that shows control characters of texts instead of obeying them, in cells of tables too."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, as `printable` has it."""
        return super().render_str(printable.lines(text), **options)


def out() -> Console:
    """The console for results (stdout); square brackets are text, as a folder's name may hold some.

    Into a file or a pipe every line goes whole, those of tables too.
    """
    terminal = sys.stdout.isatty()
    return _Console(highlight=False, markup=False, soft_wrap=not terminal, width=None if terminal else _WIDE)


def err() -> Console:
    """The console for talk (stderr): that of the bar while one is drawn, so that lines come above it."""
    return (
        _drawing[-1]
        if _drawing
        else _Console(stderr=True, highlight=False, markup=False, soft_wrap=not sys.stderr.isatty())
    )


def note(sentence: object) -> None:
    """Print a note on stderr, in one line."""
    click.echo(f"note: {printable.line(sentence)}", err=True)


def print_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print one JSON object, or a list of them, on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def tell(sentence: str) -> None:
    """Say a sentence on stderr."""
    err().print(sentence)


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


class _Speed(TransferSpeedColumn):
    """Bytes per second, of what is counted in bytes."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names

    def render(self, task: Task) -> Text:
        return super().render(task) if task.description in self._names else Text()


_drawing: list[Console] = []


@contextmanager
def _drawn_on(console: Console) -> Iterator[None]:
    _drawing.append(console)
    try:
        yield
    finally:
        _drawing.pop()


@contextmanager
def progress_bar(quiet: bool = False, in_bytes: Collection[str] = ()) -> Iterator[progress_protocol.Progress]:
    """A Progress drawn on stderr while the block runs; nothing when stderr isn't a terminal or `quiet`.

    in_bytes: what is counted in bytes, and so shown with its speed.
    """
    console = err()
    if quiet or not console.is_terminal:
        yield progress_protocol.silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Speed(in_bytes),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _drawn_on(console), Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
