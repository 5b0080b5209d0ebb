"""Calibration: text goes through the model, layer by layer, and leaves the statistics of what each reads.

For every distinct input of a layer's linears one Gram matrix H = X^T X / n is gathered; the caller answers
with the weights that the layer will have from then on. So the memory is the model, the hidden states of the
text (tokens x hidden size) and one layer's inputs. What later layers see is a choice, `Walk.sees`:

    "original"   every layer reads what it reads in the model as trained; one pass
    "inputs"     every linear reads what the requantized ones before it give; about three passes

With the second, `follow_target` shifts each linear's target so that it makes up for what those before it did.
The best weight for inputs X~ where the original ones were X is `W (X^T X~)(X~^T X~)^-1` (damped; Arai and
Ichikawa, QEP, https://arxiv.org/abs/2504.09629). Where the output is added to a stream of hidden states,
R in the model as trained and R~ behind requantized layers, `(R - R~)^T X~ (X~^T X~)^-1` is the part of the
stream's error that this linear can still undo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from vera_edge.arrays import Float32, Int64
from vera_edge.errors import DataError
from vera_edge.progress import Progress, silent
from vera_edge.reference.layers import Changed, Layer, Stack
from vera_edge.requantize.gram import one_blas_thread

# How much damping a token less per input costs: errors on other text were least between 1 and 4.
_DAMP = 2.0
_LEAST_DAMP = 0.01
Sees = Literal["original", "inputs"]


@dataclass(frozen=True)
class LayerInputs:
    """The statistics of one input. `modules`: the linears that read it. `gram`: X^T X / n (in, in) float32.

    `count`: n, the tokens. `cross`: X^T X~ / n (in, in), original against requantized inputs, where they
    differ; else None. `stream`: (R - R~)^T X~ / n (out, in), where the output is added to a stream.
    `means`: of X~ (in,), of X (in,), and of R - R~ (out,) where there is a stream.
    """

    modules: tuple[str, ...]
    gram: Float32
    count: int
    cross: Float32 | None = None
    stream: Float32 | None = None
    means: tuple[Float32, Float32, Float32 | None] | None = None

    @property
    def damp(self) -> float:
        """Damping for `gram`, relative to its mean diagonal: the fewer the tokens, the more.

        Few tokens make directions look unimportant that other text uses, and compensation pushes rounding
        errors into those.
        """
        return max(_LEAST_DAMP, _DAMP * self.gram.shape[0] / self.count)


# Called once for every input; gives what modules have from now on, those that change.
Answer = Callable[[LayerInputs], Mapping[str, Changed]]


@dataclass
class Walk:
    """A walk of `windows` of token ids through a causal or bidirectional transformer in float32.

    modules: the linears whose inputs are wanted. sees: what later layers read.
    """

    model: nn.Module
    modules: frozenset[str]
    windows: Sequence[Int64]
    sees: Sees = "original"
    progress: Progress = silent

    def run(self, answer: Answer) -> None:
        """Visit every input once, in the order of computation.

        Raises DataError without any text, or when the model has no stack of layers that this can walk.
        """
        if not self.windows:
            raise DataError("there is no text to calibrate with; give a longer file")
        with torch.inference_mode():
            stack = Stack.find(self.model, self.modules, self.windows)
            hidden = stack.first_inputs(self.model, self.windows)
            original = list(hidden)
            for index in range(len(stack.layers)):
                self.progress("calibrating", index, len(stack.layers))
                layer = Layer(stack, index, self.windows)
                if self.sees == "original":
                    hidden = _plain(layer, hidden, answer)
                else:
                    hidden, original = _following(layer, hidden, original, answer)
            self.progress("calibrating", len(stack.layers), len(stack.layers))


def _plain(layer: Layer, hidden: list[torch.Tensor], answer: Answer) -> list[torch.Tensor]:
    """One layer whose changes nothing sees; its outputs."""
    groups = layer.groups(hidden[0])
    firsts = [group[0] for group in groups]
    grams = {module: _Mean() for module in firsts}
    outputs = []
    for row, states in enumerate(hidden):
        inputs, output = layer.inputs(firsts, states, row, to_the_end=True)
        assert output is not None
        outputs.append(output)
        for module, x in inputs.items():
            grams[module].add(x, x)
    for group in groups:
        gram = grams.pop(group[0])
        mean = gram.mean()
        answer(LayerInputs(group, gram.value(), gram.count, means=(mean, mean, None)))
    return outputs


def _following(
    layer: Layer, hidden: list[torch.Tensor], original: list[torch.Tensor], answer: Answer
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One layer input by input, each with the changes before it; both streams' outputs."""
    groups, added_to = layer.groups(original[0]), layer.added_to(original[0])
    kept = {module: Changed(layer.linears[module].weight.data) for group in groups for module in group}
    changed: dict[str, Changed] = {}
    wanted = {group[0]: [group[0], *(added_to[m] for m in group if m in added_to)] for group in groups}
    everything = sorted({part for parts in wanted.values() for part in parts})
    passes = [layer.inputs(everything, x, row, to_the_end=True) for row, x in enumerate(original)]
    for group in groups:
        first, *stream = wanted[group[0]]
        gram, cross, off = _Mean(), _Mean(), _Mean()
        layer.use(kept | changed)
        for row, states in enumerate(hidden):
            before, (now, _) = passes[row][0], layer.inputs([first, *stream], states, row)
            gram.add(now[first], now[first])
            cross.add(before[first], now[first])
            if stream:
                off.add(before[stream[0]] - now[stream[0]], now[first])
        alone = len(group) == 1 and bool(stream)
        means = gram.mean(), cross.mean(), off.mean() if alone else None
        shift = off.value() if alone else None
        changed |= answer(LayerInputs(group, gram.value(), gram.count, cross.value(), shift, means))
    layer.use(kept | changed)
    outputs = [layer(x, row) for row, x in enumerate(hidden)]
    return outputs, [output for _, output in passes if output is not None]


class _Mean:
    """X^T Y / n and the mean of X, summed up piece by piece."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._total: torch.Tensor | None = None
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        product, total = x.T @ y, x.sum(0)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._total = total if self._total is None else self._total.add_(total)
        self.count += x.shape[0]

    def mean(self) -> Float32:
        assert self._total is not None
        found: Float32 = (self._total / self.count).numpy()
        return found

    def value(self) -> Float32:
        assert self._sum is not None
        found: Float32 = (self._sum / self.count).numpy()
        return found


def follow_target(weight: Float32, inputs: LayerInputs, share: float, damp: float | None = None) -> Float32:
    """`weight` (out, in) moved towards the best one for inputs and a stream that changed; `share` of the way.

    W + share * (W (C - H) + S)(H + damp * mean diagonal)^-1, C = X^T X~, H = X~^T X~, S = (R - R~)^T X~.
    damp: `inputs.damp` unless given.
    """
    if inputs.cross is None or share == 0:
        return weight
    gram = inputs.gram.astype(np.float64)
    damping = inputs.damp if damp is None else damp
    gram[np.diag_indices_from(gram)] += damping * np.trace(gram) / gram.shape[0]
    with one_blas_thread():
        pull = weight @ (inputs.cross - inputs.gram)
        if inputs.stream is not None:
            pull += inputs.stream
        shift = np.linalg.solve(gram, pull.astype(np.float64).T).T
    return weight + np.float32(share) * shift.astype(np.float32)
