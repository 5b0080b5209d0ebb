"""What the functions of the public interface have in common: how they take paths, adapters, sizes, plans."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vera_edge.errors import PlanError
from vera_edge.sizes import parse_size

if TYPE_CHECKING:
    from vera_edge.base.trained_as import TrainedAs
    from vera_edge.plans.plan import Plan
    from vera_edge.text.mixture import Mixture

BUILT_IN = "built-in"
StrPath = str | os.PathLike[str]
# A folder; several, that share their projections; or several with what scales the delta of each.
Adapters = StrPath | Sequence[StrPath | tuple[StrPath, float]] | Mapping[str, float] | Mapping[Path, float]

# A text; several; or several with the share of the tokens that each is to have.
Texts = StrPath | Sequence[StrPath] | Mapping[str, float | None] | Mapping[Path, float | None]


def mixture(texts: Texts) -> Mixture:
    """Texts to calibrate on, with built-in text unless their shares leave none for it; raises PlanError."""
    from vera_edge.text.mixture import Mixture  # tokenizers comes with it

    if isinstance(texts, str | os.PathLike):
        return Mixture.of(str(texts))
    if isinstance(texts, Mapping):
        words = [str(name) if share is None else f"{name}={share}" for name, share in texts.items()]
        return Mixture.of(words)
    return Mixture.of([str(text) for text in texts])


def path_or_none(path: StrPath | None) -> Path | None:
    """`path` as a Path."""
    return None if path is None else Path(path)


def weighted(adapter: Adapters, weight: float = 1.0) -> list[tuple[Path, float]]:
    """Each adapter's folder and its weight: its own, else `weight`."""
    if isinstance(adapter, str | os.PathLike):
        return [(Path(adapter), weight)]
    if isinstance(adapter, Mapping):
        return [(Path(path), float(own)) for path, own in adapter.items()]
    return [
        (Path(one[0]), float(one[1])) if isinstance(one, tuple) else (Path(one), weight) for one in adapter
    ]


def folders(paths: StrPath | Sequence[StrPath]) -> list[Path]:
    """One folder or several, as a list."""
    return [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]


def loading(trained_as: str | TrainedAs | None) -> TrainedAs | None:
    """How a base was loaded in training, from words like "nf4,double"; raises PlanError on other words."""
    if not isinstance(trained_as, str):
        return trained_as
    from vera_edge.base.trained_as import parse  # numpy comes with it

    return parse(trained_as)


def check_base_given(base: StrPath | None, trained_as: object) -> None:
    """Raise PlanError when it's said how the base was loaded, and not which base."""
    if base is None and trained_as is not None:
        raise PlanError("trained_as says how the base was loaded; give the base with it")


def plan_or_none(plan: StrPath | Plan | None, **decided: tuple[Any, Any]) -> Plan | None:
    """A plan, read from its file. decided: what a plan decides: what was given, and what stands for nothing.

    Raises PlanError when a plan is given and something that it decides beside it.
    """
    if plan is None:
        return None
    for name, (given, nothing) in decided.items():
        if given != nothing:
            raise PlanError(
                f"the plan decides {name}, which was given as {given!r}; leave it out beside plan"
            )
    if not isinstance(plan, str | os.PathLike):
        return plan
    from vera_edge.plans import plan as plans

    return plans.read(Path(plan))


def size_or_none(size: int | str | None) -> int | None:
    """Bytes, of a number or of words like "90MB"; raises PlanError for other words."""
    return parse_size(size) if isinstance(size, str) else size
