"""What is asked of automatic precision, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from vera_edge.device.check.products import FORMATS
from vera_edge.errors import PlanError
from vera_edge.exporting.target import OLD_NAMES
from vera_edge.plans.plan import Mode
from vera_edge.requantize import METHODS, Effort, devices
from vera_edge.requantize.effort import DEFAULT, QUICK
from vera_edge.rounding.weight_rounding import BUILT_IN
from vera_edge.text.mixture import Mixture

TARGETS = ("onnx", *OLD_NAMES)
SENSITIVITY_TOKENS = 512
# Plans are measured on so many times the tokens that units are.
CHECKED = 2


@dataclass(frozen=True)
class PlanRequest:
    """max_size: bytes of all files of the export. max_kl: mean KL in nats on `data`. max_latency: time of the
    layers' products over that of the quickest choice, on this machine or by `device_times`, a file of
    `vera-edge bench --products --json`. One of the three.

    formats: what layers may be stored as, integers also with a block ("int4:16", "int8:128"; 32 unless said);
    "int4" and "int8" or "fp32" also what embeddings and head may.
    method, effort, calibration: how weights are rounded, as an export does; on `calibration_tokens` of text,
    or as many as the effort takes. data: the text that sensitivities (`tokens` of it) and plans (twice as
    many) are measured on. Where it is None, the first text to calibrate on that isn't built-in, or the
    built-in one to measure on. max_memory: bytes; a model that takes more than half of them in float32 is
    read layer by layer. device: see `Rounding`.
    """

    max_size: int | None = None
    max_kl: float | None = None
    max_latency: float | None = None
    device_times: str | None = None
    mode: str = "merged"
    formats: tuple[str, ...] = ("int4", "int8")
    target: str = "onnx"
    method: str = "gptq"
    calibration: str | Mixture = BUILT_IN
    data: str | None = None
    tokens: int = SENSITIVITY_TOKENS
    calibration_tokens: int | None = None
    effort: str = DEFAULT
    max_memory: int | None = None
    device: str = devices.CPU

    @property
    def trial_tokens(self) -> int:
        """How many tokens a trial is calibrated on."""
        return self.calibration_tokens or Effort.named(self.effort).tokens

    @property
    def unit_effort(self) -> Effort:
        """What rounding each unit by itself spends; trials are rounded with the effort that was asked for.

        A limit of KL needs what units lose. Within a size or a latency they are only ranked, and the quickest
        effort ranks them nearly alike: all lose more by it, and linears of one kind by the same factor.
        """
        return Effort.named(self.effort if self.max_kl is not None else QUICK)

    @property
    def unit_tokens(self) -> int:
        """How many tokens units are calibrated on."""
        return (
            self.trial_tokens if self.max_kl is not None else min(self.trial_tokens, self.unit_effort.tokens)
        )

    @property
    def check_tokens(self) -> int:
        """How many tokens plans are measured on."""
        return CHECKED * self.tokens

    def check(self) -> None:
        """Raise PlanError when this can't be asked."""
        if sum(limit is not None for limit in (self.max_size, self.max_kl, self.max_latency)) != 1:
            raise PlanError("give a limit, one of --max-size, --max-kl and --max-latency, and no more")
        if self.max_latency is not None and not 1 <= self.max_latency < math.inf:
            raise PlanError(
                f"--max-latency is {self.max_latency}; give a multiple of the quickest choice's, 1 or more"
            )
        if self.max_size is not None and self.max_size <= 0:
            raise PlanError(f"nothing fits into {self.max_size} bytes; give a larger --max-size")
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise PlanError(f"--max-kl is {self.max_kl}; give a number of nats above 0, like 0.02")
        if self.mode not in get_args(Mode):
            raise PlanError(f"mode {self.mode!r} isn't known; choose merged or branch")
        if self.target not in TARGETS:
            raise PlanError(f"plans are measured for the target {TARGETS[0]}, not for {self.target!r}")
        if self.method not in METHODS:
            raise PlanError(f"no quantization method is called {self.method!r}; known: {', '.join(METHODS)}")
        Effort.named(self.effort)
        if self.device not in devices.DEVICES:
            devices.chosen(self.device)
        unknown = [name for name in self.formats if split(name)[0] not in FORMATS]
        if unknown or not self.formats:
            raise PlanError(
                f"layers can't be planned as {unknown[0] if unknown else 'nothing'!r}; choose from "
                f"{', '.join(FORMATS)}"
            )
        if twice := [name for name in self.formats if self.formats.count(name) > 1]:
            raise PlanError(f"{twice[0]} is among the formats more than once")


def split(name: str) -> tuple[str, str | None]:
    """ "int4:16" as "int4" and "16"; None where no block is said."""
    kind, _, block = name.partition(":")
    return kind, block or None


def parse_ratio(text: str) -> float:
    """1.2 of "1.2x" or "1.2". Raises PlanError for anything else."""
    try:
        return float(text.strip().removesuffix("x"))
    except ValueError:
        raise PlanError(f"{text!r} isn't a multiple; write it as 1.2x") from None
