"""How much is spent on rounding: three named efforts, chosen by measuring (docs/requantize.md)."""

from __future__ import annotations

from dataclasses import dataclass

from vera_edge.errors import PlanError


@dataclass(frozen=True)
class Effort:
    """How far "gptq" goes: `rounds` of refitting the scales and then `sweeps` over the codes.

    `damp` and `act_order` apply where a plain Gram matrix is given; a prepared one brings its own.
    tokens: of text that a model is calibrated on, about. follows: whether each linear is rounded for what
    the rounded ones before it give, which takes two passes over the text instead of one.
    """

    rounds: int = 2
    sweeps: int = 2
    damp: float = 0.01
    act_order: bool = False
    tokens: int = 16384
    follows: bool = True

    @classmethod
    def named(cls, name: str) -> Effort:
        """One of `EFFORTS`. Raises PlanError for any other name."""
        if name not in _NAMED:
            raise PlanError(f"no effort is called {name!r}; known: {', '.join(_NAMED)}")
        return _NAMED[name]


DEFAULT, QUICK = "default", "quick"
_NAMED = {
    QUICK: Effort(rounds=0, sweeps=0, tokens=4096),
    DEFAULT: Effort(),
    "thorough": Effort(rounds=3, tokens=32768),
}
EFFORTS = tuple(_NAMED)
