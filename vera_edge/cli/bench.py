"""`vera-edge bench`: how fast is a bundle on this device, and how much memory does it take?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    huge_pages_option,
    json_option,
    out,
    print_json,
    progress_bar,
    quiet_option,
    resident_option,
    tell,
)
from vera_edge.cli.trust import takes_trust

if TYPE_CHECKING:
    from vera_edge.api.bench import Bench, Spread

_WORDS = {
    "load": "load, s",
    "first_token": "first token, s",
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
    "peak_rss": "peak memory, MB",
    "energy": "energy, J/token",
}


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in (value or "").split(",") if part)
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise click.BadParameter(f"{value!r} isn't a list of numbers of threads; write 1,2,4")
    return counts


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--against", type=FOLDER, help="Another bundle, measured in turn with BUNDLE and compared.")
@click.option(
    "--threads", callback=_counts, metavar="1,2,4", help="Thread counts to try; all cores by default."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Repetitions.")
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="Tokens to feed.")
@click.option("--new", type=click.IntRange(2), default=64, show_default=True, help="Tokens to generate.")
@click.option(
    "--products",
    is_flag=False,
    flag_value="int4,int4:64,int4:128,int8,int8:64,int8:128,fp32",
    default="",
    metavar="[LIST]",
    help="Also time the layers' products in these formats, for plan --device-times; without a LIST in int4 "
    "and int8 in blocks of 32, 64 and 128, and in fp32.",
)
@resident_option
@huge_pages_option
@json_option
@quiet_option
@takes_trust
def bench(
    bundle: Path,
    against: Path | None,
    threads: tuple[int, ...],
    rounds: int,
    prompt: int,
    new: int,
    products: str,
    resident: bool,
    huge_pages: bool,
    as_json: bool,
    quiet: bool,
    **trust: Any,
) -> None:
    """Measure BUNDLE on this device: load, first token, prefill, decode, memory, energy where it is told."""
    with progress_bar(quiet or as_json) as progress:
        result = vera_edge.bench(
            bundle,
            against=against,
            threads=threads,
            rounds=rounds,
            prompt=prompt,
            new=new,
            products=[name.strip() for name in products.split(",") if name.strip()],
            resident=resident,
            huge_pages=huge_pages,
            progress=progress,
            tell=tell,
            **trust,
        )
    if as_json:
        print_json(result.to_dict())
        return
    _show(result)


def _show(result: Bench) -> None:
    console = out()
    for row in result.measured:
        console.print(f"{row.bundle}, threads: {row.threads}")
        table = Table("", "median", "p10", "p90")
        for figure, spread in row.figures.items():
            table.add_row(_WORDS[figure], *_numbers(figure, spread))
        shares = {share: f"{value:.2f}" for share, value in row.token_ms.items()}
        table.add_row("one token, ms", shares["50"], f"p95: {shares['95']}", f"p99: {shares['99']}")
        console.print(table)
    if result.products:
        times = Table("threads", "format", "block", "out x in", "microseconds")
        for timed in result.products:
            shape, block = f"{timed.out} x {timed.inside}", str(timed.block or "")
            times.add_row(str(timed.threads), timed.format, block, shape, f"{timed.nanoseconds / 1e3:.1f}")
        console.print(times)
    if result.ratios:
        ratios = Table("threads", "ratio of medians", "", "95 % interval")
        for one in result.ratios:
            interval = f"{one.low:.3f} to {one.high:.3f}"
            ratios.add_row(str(one.threads), _WORDS[one.figure].split(",")[0], f"{one.ratio:.3f}", interval)
        console.print(ratios)
    console.print(
        f"{result.device['processor']}; {result.prompt} tokens fed, {result.new} generated, "
        f"{result.rounds} rounds" + (", adapter resident" if result.resident else "")
    )


def _numbers(figure: str, spread: Spread) -> tuple[str, str, str]:
    scale = 1e-6 if figure == "peak_rss" else 1.0
    median, low, high = (value * scale for value in (spread.median, spread.low, spread.high))
    return f"{median:.4g}", f"{low:.4g}", f"{high:.4g}"
