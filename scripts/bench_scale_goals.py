"""What the project wants to reach at real sizes on two cores and 24 GiB, and where measured rows stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.bench_scale_results import Result

GB = 1e9
_MINUTE = 60.0


@dataclass(frozen=True)
class Goal:
    """`value` of a row in `unit`, None where it can't be told, should be at most `bound`."""

    what: str
    size: str
    base: str
    row: str
    value: Callable[[Result], float | None]
    bound: float
    unit: str
    peer: str | None = None  # the value is then divided by that of this row


def _memory(result: Result) -> float:
    return result.peak / GB


def _minutes(result: Result) -> float:
    return result.wall / _MINUTE


def _to_products(result: Result) -> float | None:
    return None if not result.flops else result.wall / products_seconds(result, result.flops)


def products_seconds(result: Result, flops: float) -> float:
    """Seconds that so many operations take at the matrix speed measured in the same sitting."""
    return flops / (result.machine.gflops * 1e9)


def merge_limit(result: Result) -> float | None:
    """A merge's wall time over the slower of copying the base and the deltas' products."""
    if not result.flops:
        return None
    slower = max(result.base_bytes / result.machine.copied, products_seconds(result, result.flops))
    return result.wall / slower


def _disk_to_output(result: Result) -> float | None:
    return result.disk / result.output if result.output else None


GOALS: Sequence[Goal] = (
    Goal("int8 export, memory", "1.2b", "nf4", "int8", _memory, 2.5, "GB"),
    Goal("int8 export, time", "1.2b", "nf4", "int8", _minutes, 3, "min"),
    Goal("int8 export, memory", "8b", "nf4", "int8", _memory, 6, "GB"),
    Goal("int8 export, disk over the output", "8b", "nf4", "int8", _disk_to_output, 1.2, "times"),
    Goal("int4 export, default, time", "1.2b", "nf4", "int4-default", _minutes, 75, "min"),
    Goal("int4 export, default, memory", "1.2b", "nf4", "int4-default", _memory, 4, "GB"),
    Goal(
        "int4 export, default, over its products", "1.2b", "nf4", "int4-default", _to_products, 1.5, "times"
    ),
    Goal("int4 export, quick, time", "1.2b", "nf4", "int4-quick", _minutes, 15, "min"),
    Goal("int4 export, quick, over its products", "1.2b", "nf4", "int4-quick", _to_products, 1.5, "times"),
    Goal("drift of the int8 export, memory", "8b", "nf4", "drift", _memory, 6, "GB"),
    Goal("drift of the merge, memory", "8b", "nf4", "drift-merge", _memory, 6, "GB"),
    Goal("merge, over the slower of copy and products", "8b", "nf4", "merge", merge_limit, 1.5, "times"),
    Goal("merge, over PEFT's time", "1.2b", "bf16", "merge", lambda r: r.wall, 1 / 3, "times", peer="peft"),
)


def lines(results: Sequence[Result]) -> list[str]:
    """A Markdown table of the goals."""
    known = {(one.size, one.base, one.row): one for one in results}
    table = ["| goal | model | at most | measured | |", "|---|---|--:|--:|---|"]
    for goal in GOALS:
        bound = f"{goal.bound:.2f} {goal.unit}" if goal.bound < 1 else f"{goal.bound:g} {goal.unit}"
        measured, verdict = _stands(goal, known)
        cells = [goal.what, f"{goal.size}, {goal.base}", bound, measured, verdict]
        table.append(f"| {' | '.join(cells)} |")
    return table


def _stands(goal: Goal, known: dict[tuple[str, str, str], Result]) -> tuple[str, str]:
    result = known.get((goal.size, goal.base, goal.row))
    if result is None:
        return "", "not measured"
    if not result.done:
        return "", result.end
    value = goal.value(result)
    if goal.peer is not None:
        peer = known.get((goal.size, goal.base, goal.peer))
        other = goal.value(peer) if peer is not None and peer.done else None
        value = value / other if value is not None and other else None
    if value is None:
        return "", "can't be told"
    part = "" if result.layers == result.all_layers else f", at {result.layers} of {result.all_layers} layers"
    if part and goal.unit == "min":  # what embeddings and start take is counted too often then
        value *= result.all_layers / result.layers
        part = f", by proportion: {result.layers} of {result.all_layers} layers were run"
    return f"{value:.2f} {goal.unit}", ("reached" if value <= goal.bound else "**not reached**") + part
