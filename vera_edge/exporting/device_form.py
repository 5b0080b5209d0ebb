"""Which form of a model a device gets: the one that loses least among those that fit and are quick enough.

What is reckoned here is so from measurements on SmolLM2-135M and a model of 1.2 billion weights; the truth is
told by `vera-edge bench` on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vera_edge.errors import PlanError

QUICK = 10.0  # tokens a second, somewhat faster than people read
_CONTEXT = 2048  # tokens of the KV cache that is counted
# Of a process that runs a bundle, beside the cache: docs/scale.md, 2.06 GB for a bundle of 1.39.
_PROCESS, _COPIES = 150_000_000, 1.4
# Bytes of a bundle read in a second, against merged int8's: docs/speed.md, two threads (MB times tokens/s).
_EFFICIENCY: Mapping[tuple[str, str], float] = {
    ("merged", "int8"): 1.0,
    ("merged", "int4"): 0.75,
    ("merged", "fp32"): 1.5,
    ("branch", "int8"): 0.65,
    ("branch", "int4"): 0.47,
    ("branch", "nf4"): 0.13,
    ("branch", "fp4"): 0.13,
    ("branch", "same"): 0.47,
}


@dataclass(frozen=True)
class Form:
    """How an export is stored. head: None for what goes with the weights by itself."""

    mode: str
    weights: str
    head: str | None = None

    @property
    def efficiency(self) -> float:
        """How fast its bytes are read against those of merged int8; the slowest where it isn't known."""
        return _EFFICIENCY.get((self.mode, self.weights), min(_EFFICIENCY.values()))

    def __str__(self) -> str:
        return f"{self.mode}, {self.weights} weights" + (f", {self.head} head" if self.head else "")


@dataclass(frozen=True)
class Reckoned:
    """A form with what it takes: bytes of memory as it runs; tokens a second, 0 where no text is made."""

    form: Form
    memory: int
    speed: float


def forms(mode: str | None, own: str) -> list[Form]:
    """What can be chosen, the one that loses least first.

    mode: "merged", "branch", or None for any. own: what a branch is stored as where nobody asks: in a
    quantized base's own integers it loses nothing.
    """
    merged = [Form("merged", "int8"), Form("merged", "int4"), Form("merged", "int4", "int4")]
    branch = [Form("branch", "int8"), Form("branch", "int4"), Form("branch", "int4", "int4")]
    exact = [Form("branch", own)] if own != "int8" else []
    if mode is None:
        return [*exact, *merged]
    return merged if mode == "merged" else [*exact, *branch]


def reckon(form: Form, size: int, config: Mapping[str, Any], stream: float, generates: bool) -> Reckoned:
    """What a form of `size` bytes takes on a device that reads `stream` bytes of int8 weights in a second."""
    memory = int(_PROCESS + _COPIES * size + (cache_bytes(config) if generates else 0))
    return Reckoned(form, memory, stream * form.efficiency / max(size, 1) if generates else 0.0)


def cache_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a decoder's float32 keys and values of 2048 tokens, or of fewer where it takes no more."""
    heads = config.get("num_attention_heads") or 1
    width = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    tokens = min(config.get("max_position_embeddings") or _CONTEXT, _CONTEXT)
    layers, shared = config.get("num_hidden_layers") or 0, config.get("num_key_value_heads") or heads
    return int(2 * 4 * layers * shared * width * tokens)


def choose(asked: Sequence[Form], reckoned: Callable[[Form], Reckoned | None], memory: int) -> Reckoned:
    """The first of `asked` that fits `memory` bytes and is quick, else the quickest that fits.

    reckoned: None for a form that the model can't be stored in.
    Raises PlanError when none fits.
    """
    known = [found for form in asked if (found := reckoned(form)) is not None]
    if not known:
        raise PlanError(
            "this model can't be stored in any form that --for chooses from; give --weights instead"
        )
    fits = [one for one in known if one.memory <= memory]
    if not fits:
        least = min(known, key=lambda one: one.memory)
        raise PlanError(
            f"the model doesn't fit: its smallest form ({least.form}) takes about {least.memory / 1e9:,.2f} "
            f"GB as it runs, and there are {memory / 1e9:,.2f} GB for it; take a larger device or a smaller "
            "model"
        )
    quick = [one for one in fits if one.speed >= QUICK or not one.speed]
    return quick[0] if quick else max(fits, key=lambda one: one.speed)


def why(chosen: Reckoned, name: str, source: str) -> str:
    """A sentence: what a device gets, why, and what of that is reckoned."""
    takes = f"about {chosen.memory / 1e9:,.2f} GB of memory"
    if chosen.speed:
        takes += f" and gives about {chosen.speed:,.0f} tokens/s"
    if not chosen.speed:
        reason = "loses least of those that fit"
    elif chosen.speed >= QUICK:
        reason = f"loses least of those that fit and reach {QUICK:.0f} tokens/s"
    else:
        reason = "is the quickest that fits"
    return (
        f"for {name}: {chosen.form}, the form that {reason}; it takes {takes}, all "
        f"reckoned ({source}); `vera-edge bench` measures"
    )
