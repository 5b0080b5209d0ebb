"""An adapter trained towards another model's answers: KL by Adam, a window of text a step.

Only VeRA's lambda vectors change, some thousands of numbers for a whole model, or LoRA's pairs. What is
judged are windows that aren't trained on, and the values that did best there are kept: those of the beginning
are among them, so that the result is never worse than it began on that text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vera_edge import divergence
from vera_edge.arrays import Float32, Int64
from vera_edge.progress import Progress, silent
from vera_edge.reference.layers import forward
from vera_edge.reference.rotary import forget_lengths

WHAT = "adapting"  # in progress, whose unit is a step
# What PEFT's layers hold, in the order of the rates: the outer one, which is zero before any training, first.
_TRAINED = (("vera_lambda_b", "vera_lambda_d"), ("lora_B", "lora_A"))
_CLIP = 1.0
_FIRST = 5  # steps in which the rate rises

# By layer, and by what an adapter's file calls them, like "vera_lambda_b" or "lora_A.weight"; float32.
Arrays = Mapping[str, Mapping[str, Float32]]


@dataclass(frozen=True)
class Schedule:
    """How an adapter is trained.

    rates: Adam's for lambda_b and lambda_d, or B and A, as shares of the root mean square of what was
    trained, falling as a cosine does. every: steps between two looks at the held-out windows. patience: how
    many looks without an improvement end it.
    """

    steps: int = 160
    rates: tuple[float, float] = (0.02, 0.004)
    every: int = 10
    patience: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """What came of it. arrays: the best. before, after: mean KL in nats on the held-out windows.

    steps: taken; best: the one that gave `arrays`, 0 for the beginning. tokens: of all steps together.
    stopped: why before the last step.
    """

    arrays: Arrays
    before: float
    after: float
    steps: int
    best: int
    tokens: int
    stopped: str | None = None


def distil(
    teacher: Callable[[Int64], Float32],
    student: Any,
    training: Sequence[Int64],
    held_out: Sequence[Int64],
    schedule: Schedule | None = None,
    progress: Progress = silent,
) -> Distilled:
    """Train PEFT's VeRA or LoRA layers in `student` towards the logits that `teacher` gives.

    teacher: logits (n, vocabulary) float32 of n token ids. Everything else in the model stays as it is.
    """
    work = _Work(teacher, student, held_out, schedule or Schedule())
    return work.run(training, progress)


@dataclass
class _Work:
    teacher: Callable[[Int64], Float32]
    student: Any
    held_out: Sequence[Int64]
    schedule: Schedule
    wanted: list[Float32] = field(init=False)
    layers: dict[str, dict[str, Any]] = field(init=False)
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        self.layers = {
            name.removeprefix("base_model.model."): held
            for name, layer in self.student.named_modules()
            if (held := _parameters(layer))
        }
        groups = []
        for index, rate in enumerate(self.schedule.rates):
            trained = [list(held.values())[index] for held in self.layers.values()]
            for parameter in trained:
                parameter.requires_grad_(requires_grad=True)
            size = math.sqrt(float(torch.cat([one.detach().flatten() ** 2 for one in trained]).mean()))
            groups.append({"params": trained, "lr": rate * size, "full": rate * size})
        self.optimizer = torch.optim.Adam(groups)
        # The held-out windows are few, and the teacher doesn't change.
        self.wanted = [
            divergence.log_softmax(self.teacher(window)).astype(np.float32) for window in self.held_out
        ]

    def run(self, training: Sequence[Int64], progress: Progress) -> Distilled:
        before = after = self.judge()
        best, kept, waited, stopped, step, tokens = 0, self.arrays(), 0, None, 0, 0
        for step, window in enumerate(self._order(training), 1):
            progress(WHAT, step - 1, self.schedule.steps)
            tokens += len(window)
            if not self._learn(window, step):
                stopped = f"the loss wasn't finite at step {step}, and the values before it were kept"
                break
            if step % self.schedule.every and step != self.schedule.steps:
                continue
            found = self.judge()
            if found < after:  # not so where it is NaN
                best, kept, after, waited = step, self.arrays(), found, 0
            else:
                waited += 1
            if not math.isfinite(found) or waited >= self.schedule.patience:
                stopped = f"the held-out loss fell no more after step {best}"
                break
        progress(WHAT, self.schedule.steps, self.schedule.steps)
        return Distilled(kept, before, after, step, best, tokens, stopped)

    def judge(self) -> float:
        """The mean KL of the held-out windows, in nats a token."""
        total = count = 0.0
        with torch.no_grad():  # what rotary embeddings keep of a pass is read in training, too
            for window, wanted in zip(self.held_out, self.wanted, strict=True):
                logits = self._logits(window).numpy()
                if not np.isfinite(logits).all():
                    return math.nan
                found = divergence.kl(wanted.astype(np.float64), divergence.log_softmax(logits))
                total, count = total + float(found.sum()), count + found.size
        return total / count

    def arrays(self) -> Arrays:
        """What is trained as it is, copied."""
        return {
            name: {kind: one.detach().cpu().numpy().copy() for kind, one in held.items()}
            for name, held in self.layers.items()
        }

    def _learn(self, window: Int64, step: int) -> bool:
        """One step of Adam; false, and nothing changed, where the loss or its gradient isn't finite."""
        turn = math.cos(math.pi * (step - 1) / self.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * min(1.0, step / _FIRST) * (0.5 + 0.5 * turn)
        wanted = torch.from_numpy(self.teacher(window)).log_softmax(-1)
        self.optimizer.zero_grad()
        found = self._logits(window).log_softmax(-1)
        loss = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        loss.backward()  # type: ignore[no-untyped-call]
        every = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        size = torch.nn.utils.clip_grad_norm_(every, _CLIP)
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(size)):
            return False
        self.optimizer.step()
        return True

    def _logits(self, window: Int64) -> torch.Tensor:
        forget_lengths(self.student)
        found: torch.Tensor = forward(self.student, window).logits[0].float()
        return found

    def _order(self, training: Sequence[Int64]) -> Iterator[Int64]:
        """As many windows as there are steps, each as often as the others."""
        chance, pool = random.Random(self.schedule.seed), list(range(len(training)))
        for step in range(self.schedule.steps):
            if step % len(pool) == 0:
                chance.shuffle(pool)
            yield training[pool[step % len(pool)]]


def _parameters(layer: Any) -> dict[str, Any]:
    """What a layer of PEFT's trains, by what an adapter's file calls it; nothing of any other module."""
    for ends in _TRAINED:
        held = {end: [*getattr(layer, end, {}).values()] for end in ends}
        if all(held.values()):
            named = {end: one for end, (one,) in held.items()}
            return {
                f"{end}.weight" if isinstance(one, torch.nn.Module) else end: getattr(one, "weight", one)
                for end, one in named.items()
            }
    return {}
