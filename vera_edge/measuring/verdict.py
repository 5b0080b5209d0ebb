"""What the figures mean, in one word and one sentence."""

from __future__ import annotations

from vera_edge.measuring.evaluate import Measurement
from vera_edge.measuring.result import Verdict

WARN_RETAINED = 0.9
FAIL_RETAINED = 0.5
# An adapter whose effect isn't well above the compute's own noise has nothing that could be retained.
_NOISE_FACTOR = 3.0
_SMALLEST_EFFECT = 1e-7

# Mean KL in nats of published quantizations, for scale where there is no adapter to compare with.
_BANDS = (
    (1e-5, "faithful", "no more than the noise of float32 kernels"),
    (0.002, "faithful", "as small as 8-bit weights cost"),
    (0.02, "faithful", "small"),
    (0.05, "degraded", "about what good 4-bit weights cost"),
    (0.1, "degraded", "about what plain 4-bit weights cost"),
    (float("inf"), "lost", "more than 4-bit weights cost"),
)


def judge(found: Measurement) -> Verdict:
    """The verdict over one measurement; `drift.limits` decides what fails."""
    kl = found.fidelity.kl.mean.value
    if found.effect is None:
        _, level, words = next(band for band in _BANDS if kl <= band[0])
        return Verdict(
            level, f"Mean KL from the reference is {kl:.2g} nats, {words}; no adapter is involved."
        )
    effect = found.effect.kl.mean.value
    floor = max(_SMALLEST_EFFECT, _NOISE_FACTOR * found.noise.kl.mean.value if found.noise else 0.0)
    if found.retained is None or effect < floor:
        return Verdict(
            "undecided",
            f"The adapter changes this text by a mean KL of {effect:.2g} nats, too little to tell whether "
            f"the artefact (at {kl:.2g}) keeps it; measure on text it was trained for.",
        )
    share = found.retained.value
    figures = f"fidelity {kl:.2g} nats against an effect of {effect:.2g}"
    if share < FAIL_RETAINED:
        words = "nothing" if share <= 0 else f"only {share:.0%}"
        return Verdict("lost", f"The adapter is lost: {words} of its effect is retained ({figures}).")
    if share < WARN_RETAINED:
        return Verdict(
            "degraded", f"The adapter is degraded: {share:.0%} of its effect is retained ({figures})."
        )
    return Verdict(
        "faithful", f"The adapter is kept: {_near_one(share)} of its effect is retained ({figures})."
    )


def _near_one(share: float) -> str:
    """A share that isn't rounded up to all of it."""
    return f"{share:.0%}" if share < 0.985 else f"{min(share, 0.99999):.3%}"
