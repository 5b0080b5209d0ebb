"""How memory and time grow with the model, as two SVG files on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from scripts.bench_scale_results import Result
from vera_edge.measuring.svg import Chart, as_file

# Row and base, its name in the chart, its colour.
_SERIES = (
    ("merge", "nf4", "merge, NF4", "#1f6feb"),
    ("int8", "nf4", "export int8", "#1a7f37"),
    ("int4-default", "nf4", "export int4", "#8250df"),
    ("branch", "nf4", "branch", "#bf8700"),
    ("drift", "nf4", "drift", "#cf222e"),
    ("peft", "bf16", "PEFT's merge, bf16", "#57606a"),
    ("builder", "bf16", "GenAI's builder, int4", "#8b949e"),
)
_STYLE = "".join(
    f".s{number}{{stroke:{colour}}}.dot.s{number}{{fill:{colour};r:3px}}.t{number}{{fill:{colour}}}"
    for number, (*_, colour) in enumerate(_SERIES)
)


def charts(results: Sequence[Result]) -> Mapping[str, bytes]:
    """SVG files by name: memory and time by the size of the model in float32; none without results."""
    done = [one for one in results if one.done and one.layers == one.all_layers]
    if not done:
        return {}
    return {
        "scale-memory.svg": _chart("Peak memory", done, "GB", lambda one: one.peak / 1e9, whole=True),
        "scale-time.svg": _chart("Wall time", done, "minutes", lambda one: one.wall / 60, whole=False),
    }


def _chart(
    title: str, done: Sequence[Result], unit: str, value: Callable[[Result], float], whole: bool
) -> bytes:
    """whole: draw the model in float32 as a line too."""
    lines = {
        number: sorted((one.float32 / 1e9, value(one)) for one in done if (one.row, one.base) == (row, base))
        for number, (row, base, *_) in enumerate(_SERIES)
    }
    points = [point for line in lines.values() for point in line] or [(1.0, 1.0)]
    sizes = [one.float32 / 1e9 for one in done]
    chart = Chart(
        title,
        _decades(sizes),
        _decades([y for _, y in points] + (sizes if whole else [])),
        log_x=True,
        log_y=True,
    )
    chart.grid("the model in float32, GB", f"{title.lower()}, {unit}")
    if whole:
        chart.line("noise", [(min(sizes), min(sizes)), (max(sizes), max(sizes))])
    above = 0
    for number, line in lines.items():
        if not line:
            continue
        name = _SERIES[number][2]
        chart.line(f"s{number}", line)
        for x, y in line:
            chart.dot(f"s{number}", x, y, f"{name}: {y:.3g} {unit} at {x:.3g} GB")
        chart.text(60.0, 24.0 + 14 * above, f"● {name}", kind=f"t{number}")
        above += 1
    return as_file(chart.render()).replace(b"</style>", f"{_STYLE}</style>".encode(), 1)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades around the values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)
