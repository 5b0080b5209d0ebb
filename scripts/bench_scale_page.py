"""docs/scale.md: tables of what was measured, where the goals stand, and how costs grow with the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts import bench_scale_goals
from scripts.bench_models import SIZES
from scripts.bench_scale_goals import GB, merge_limit, products_seconds
from scripts.bench_scale_plot import charts
from scripts.bench_scale_results import Result
from scripts.bench_scale_rows import Row, rows
from scripts.prepare_demo import ROOT
from vera_edge.storage.files import write_atomic

PAGE = ROOT / "docs" / "scale.md"
_COSTS = ("wall", "CPU", "memory", "of float32", "disk", "of float32", "output", "limit", "load")
_MARKS = "<!-- {}: written by scripts/bench_scale -->", "<!-- end of {} -->"


def write(results: Sequence[Result]) -> None:
    """Put what was measured into docs/scale.md, and its plots beside it."""
    shown = sorted((one for one in results if one.size != "tiny"), key=_order)
    page = PAGE.read_text(encoding="utf-8")
    page = _between(page, "goals", bench_scale_goals.lines(_largest(shown)))
    plots = charts(_largest(shown))
    images = [f"![{name.removesuffix('.svg')}]({name})" for name in plots]
    page = _between(page, "rows", [*images, *_tables(shown), *_machine(shown)])
    for name, chart in plots.items():
        write_atomic(PAGE.with_name(name), chart)
    write_atomic(PAGE, page.encode())


def _order(result: Result) -> tuple[int, int, str, str]:
    return list(SIZES).index(result.size), result.layers, result.base, result.row


def _largest(results: Sequence[Result]) -> list[Result]:
    """Of each size, base and row the result with the most layers."""
    ordered = sorted(results, key=lambda one: one.layers)
    best = {(one.size, one.base, one.row): one for one in ordered}
    return sorted(best.values(), key=_order)


def _between(page: str, name: str, lines: Sequence[str]) -> str:
    first, last = (mark.format(name) for mark in _MARKS)
    before, rest = page.split(first)
    after = rest.split(last)[1]
    return "\n".join([before + first, *lines, last]) + after


def _tables(results: Sequence[Result]) -> Iterator[str]:
    """A table for each row of ours, its peers in it."""
    known = rows()
    for name, row in known.items():
        if row.beside is not None:
            continue
        peers = [other for other, one in known.items() if one.beside == name]
        lines = list(_lines(results, [name, *peers], known))
        if lines:
            yield from ("", f"### {row.title[0].upper()}{row.title[1:]}", "")
            yield f"| model | what | {' | '.join(_COSTS)} |"
            yield f"|---|---|{'--:|' * len(_COSTS)}"
            yield from lines
    yield ""


def _lines(results: Sequence[Result], names: Sequence[str], known: dict[str, Row]) -> Iterator[str]:
    """Models in order, of each the rows of `names`."""
    wanted = [one for one in results if one.row in names]
    wanted.sort(key=lambda one: (*_order(one)[:2], names.index(one.row), one.base))
    for one in wanted:
        what = "vera-edge" if one.row == names[0] else known[one.row].title
        note = f" ({one.note})" if one.note and one.done else ""
        cells = [_model(one), what + note, *_numbers(one)]
        yield f"| {' | '.join(cells)} |"


def _model(one: Result) -> str:
    layers = "" if one.layers == one.all_layers else f", {one.layers} of {one.all_layers} layers"
    return f"{one.size}, {one.base}{layers}"


def _numbers(one: Result) -> list[str]:
    if not one.done:
        why = {"over the time": f"over {one.limit:g} min", "over the memory": "over the memory"}
        return [
            why.get(one.end, f"failed: {one.note}".replace("|", "\\|")),
            *[""] * (len(_COSTS) - 2),
            f"{one.load:.1f}",
        ]
    return [
        seconds(one.wall),
        seconds(one.cpu),
        f"{one.peak / GB:.2f} GB",
        f"{one.peak / one.float32:.2f}",
        f"{one.disk / GB:.2f} GB",
        f"{one.disk / one.float32:.2f}",
        f"{one.output / GB:.2f} GB",
        _limit(one),
        f"{one.load:.1f}",
    ]


def _limit(one: Result) -> str:
    """How many times the time that it can't do without: copy or products of a merge, products of others."""
    if not one.flops:
        return ""
    value = merge_limit(one) if one.row == "merge" else one.wall / products_seconds(one, one.flops)
    return f"{value:.1f}"


def seconds(value: float) -> str:
    """A time as people read it."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def _machine(results: Sequence[Result]) -> Iterator[str]:
    """Where it was measured, and how fast the machine was."""
    if not results:
        yield "Nothing was measured yet."
        return
    machines = [one.machine for one in results]
    names = sorted({f"{one.cores} cores of {one.processor}" for one in machines})
    gflops, copied = ([getattr(one, name) for one in machines] for name in ("gflops", "copied"))
    loads = [one.load for one in results]
    versions = sorted({f"{name} {number}" for one in results for name, number in one.versions.items()})
    yield (
        f"On {'; '.join(names)}: {min(gflops):.0f} to {max(gflops):.0f} GFLOP/s of float32 products, "
        f"{min(copied) / 1e6:.0f} to {max(copied) / 1e6:.0f} MB/s copied. The load was {min(loads):.1f} to "
        f"{max(loads):.1f} when rows began. {', '.join(versions)}."
    )
