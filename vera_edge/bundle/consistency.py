"""What the parts of a manifest have to do with each other: names are listed, sizes fit the files.

Each part has its shape already (bundle.schema.json). Here a manifest of some kilobytes is kept from asking a
device for more memory or work than the files that it lists are large.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WIDTHS = {"float32": 4, "float16": 2}
_MAX_DRAWN = 1 << 28  # values of A and B on a device: 1 GiB, eight times those of a 70B model of rank 256
_OVERLAP = 64  # layers of different sizes that read the same bytes
_SHARE = 4  # of what is drawn, at least one in so many values is put into a file

Need = Callable[[bool, str], None]


def check(value: Mapping[str, Any], need: Need) -> None:
    """Hold the parts of a manifest of the right shape against each other; `need` raises when one doesn't."""
    files = value["files"]
    need(value["model"] in files, "model names no listed file")
    need(value["golden"] is None or value["golden"] in files, "golden names no listed file")
    _check_adapters(value, need)
    _check_vectors(value, need)
    drawn = 0
    for name, entry in value.get("generated", {}).items():
        if "source" in entry:
            need(entry["source"] in files, f"generated {name!r} names no listed source")
            _check_expanded(name, entry, need)
        else:
            need(value["projection"] is not None, "generated files without a projection or a listed source")
            drawn += _check_drawn(name, entry, value["projection"], need)
    if drawn:
        spec = value["projection"]
        count = spec["rank"] * (spec["in_max"] + spec["out_max"])
        need(
            count <= min(_MAX_DRAWN, _SHARE * drawn),
            f"its projections hold {count} values, of which the generated files hold {drawn}",
        )


def _check_adapters(value: Mapping[str, Any], need: Need) -> None:
    for name, entry in value["adapters"].items():
        need(PLAIN_NAME.fullmatch(name) is not None, f"the adapter name {name[:80]!r} isn't a plain name")
        file = entry.get("file")
        need(file is None or file in value["files"], f"adapter {name} names no listed file")
        need(file is not None or value["mode"] == "merged", f"adapter {name} of a branch bundle has no file")
    default = value["default_adapter"]
    need(default is None or default in value["adapters"], f"default_adapter {default!r} isn't an adapter")


def _check_vectors(value: Mapping[str, Any], need: Need) -> None:
    """The pieces of lambda_b are rows of layers with a side-branch, each row at most once."""
    vectors = value.get("vectors", [])
    if not vectors:
        return
    plan, spec = value["plan"], value["projection"]
    need(plan is not None or spec is not None, "vectors without a plan or a projection")
    if plan is None:  # of an older version
        sizes = {module: spec["out_max"] for module, _, _ in vectors}
    else:
        sizes = {step["module"]: step["shape"][0] for step in plan["steps"] if step["action"] == "branch"}
    taken: dict[str, int] = {}
    for module, start, stop in vectors:
        need(module in sizes, f"vectors names {module!r}, which has no side-branch in the plan")
        taken[module] = taken.get(module, 0) + stop - start
        need(
            stop <= sizes[module] and taken[module] <= sizes[module],
            f"vectors asks for rows {start} to {stop} of {module}, which has {sizes[module]}",
        )
    held = _least_held(value, taken, need)
    for name, entry in value["adapters"].items():
        size = value["files"][entry["file"]]["size"] if entry.get("file") is not None else 0
        width = _WIDTHS[value.get("vector_dtype", "float32")]
        need(not size or held * width <= size, f"vectors asks for {held} values; adapter {name} holds less")


def _least_held(value: Mapping[str, Any], taken: Mapping[str, int], need: Need) -> int:
    """Values that every adapter has to bring: those of the kind of inputs that has the fewest.

    taken: rows by module that `vectors` asks for.
    """
    plan, spec, rank = value["plan"], value["projection"], value.get("lora_rank") or 0
    kinds = _kinds(value, taken, need)
    widths = {} if plan is None else {step["module"]: step["shape"][1] for step in plan["steps"]}
    counts = []
    for kind, modules in kinds.items():
        rows, inside = sum(map(taken.__getitem__, modules)), sum(widths.get(module, 0) for module in modules)
        scales = spec["rank"] * len(modules) if spec is not None else 0
        held = {"vectors": rows + scales, "pairs": rank * (rows + inside), "inputs": inside}
        counts.append(held.get(kind, rows))
    return min(counts)


def _kinds(value: Mapping[str, Any], taken: Mapping[str, int], need: Need) -> Mapping[str, list[str]]:
    """The modules that have inputs of each kind, which have to be among those `taken`."""
    plan, spec, rank = value["plan"], value["projection"], value.get("lora_rank")
    kinds: Mapping[str, list[str]] = value.get("branches") or {}
    if not kinds:
        sound = rank is None or (plan is not None and spec is None)
        need(sound, "lora_rank beside a projection, or without a plan")
        return {"vectors" if rank is None else "pairs": list(taken)}
    need(plan is not None, "branches without a plan")
    for kind, beside, what in (("pairs", rank, "lora_rank"), ("vectors", spec, "projection")):
        need((kind in kinds) == (beside is not None), f"branches with {kind} and no {what}, or the reverse")
    for kind, modules in kinds.items():
        strange = [module for module in modules if module not in taken][:1] or "no module"
        sound = bool(modules) and strange == "no module"
        need(sound, f"branches names {strange} for {kind}, which vectors doesn't")
    return kinds


def _check_drawn(name: str, entry: Mapping[str, Any], spec: Mapping[str, Any], need: Need) -> int:
    """Values that a file of projections has room for. Layers of several sizes share its bytes."""
    rows, total = {"A.T": spec["in_max"], "B": spec["out_max"]}, 0
    width = _WIDTHS[entry["dtype"]]
    for tensor, part in entry["tensors"].items():
        start, stop, offset = part["start"], part["stop"], part["offset"]
        count = (stop - start) * spec["rank"]
        need(
            start < stop <= rows[part["matrix"]],
            f"generated {name!r} asks for rows {start} to {stop} of the {rows[part['matrix']]} of "
            f"{part['matrix']}",
        )
        need(offset + count * width <= entry["size"], f"{tensor} reaches past the end of {name}")
        total += count
    need(total * width <= _OVERLAP * entry["size"], f"the tensors of {name} lie over each other too often")
    return int(entry["size"] // width)


def _check_expanded(name: str, entry: Mapping[str, Any], need: Need) -> None:
    """A row takes a byte at least; how many it takes, the source's header says."""
    total = 0
    for weight, part in entry["weights"].items():
        need(max(part["codes"], part["scales"]) < entry["size"], f"{weight} reaches past the end of {name}")
        for module, start, stop in part["rows"]:
            need(start < stop, f"generated {name!r} asks for rows {start} to {stop} of {module}")
            total += stop - start
    need(total <= entry["size"], f"the weights of {name} lie over each other")
