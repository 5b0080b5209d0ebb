"""Calibration: text goes through the model, layer by layer, and leaves the statistics of what each reads.

For every distinct input of a layer's linears one Gram matrix H = X^T X / n is gathered; the caller answers
with the weights that the layer will have from then on. Memory: the model, or of one that is streamed one
layer, the statistics of one input, and hidden states as far as there is room for them (the rest is on disk).
What later layers see is a choice, `Walk.sees`:

    "original"   every layer reads what it reads in the model as trained; one pass
    "inputs"     every linear reads what the requantized ones before it give; two passes

With the second, `follow_target` shifts each linear's target so that it makes up for what those before it did.
The best weight for inputs X~ where the original ones were X is `W (X^T X~)(X~^T X~)^-1` (damped; Arai and
Ichikawa, QEP, https://arxiv.org/abs/2504.09629). Where the output is added to a stream of hidden states,
R in the model as trained and R~ behind requantized layers, `(R - R~)^T X~ (X~^T X~)^-1` is the part of the
stream's error that this linear can still undo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from vera_edge.arrays import Float32, Int64
from vera_edge.errors import DataError
from vera_edge.plans.plan import HEAD
from vera_edge.progress import Progress, silent
from vera_edge.reference.ends import OutputHead, after_layers, widths
from vera_edge.reference.group_passes import GroupPasses, GroupPlan
from vera_edge.reference.hidden_states import ROOM, HiddenStates, Room
from vera_edge.reference.layers import Changed, Layer, Stack
from vera_edge.reference.products import Mean, MeanProduct
from vera_edge.reference.streamed import LayerStream, Run
from vera_edge.requantize.gram import Gram

# How much damping a token less per input costs: errors on other text were least between 1 and 4.
_DAMP = 2.0
_LEAST_DAMP = 0.01
Sees = Literal["original", "inputs"]


@dataclass(frozen=True)
class LayerInputs:
    """The statistics of one input. `modules`: the linears that read it. `gram`: X^T X / n (in, in) float32.

    `count`: n, the tokens. What a linear W is to make up for, where inputs are requantized: `moved`,
    (X - X~)^T X~ / n (in, in), original inputs less requantized ones, and `stream`, (R - R~)^T X~ / n
    (out, in), where the output is added to a stream. Of a linear that is alone and has few outputs, `stream`
    is all of it, with W (X - X~)^T X~ / n, and `moved` None. `means`: of X~ (in,), of X (in,), and of R - R~
    (out,) where there is a stream.
    """

    modules: tuple[str, ...]
    gram: Float32
    count: int
    moved: Float32 | None = None
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
# What the linears of one input have from now on, where that is known without statistics; else None.
Recall = Callable[[tuple[str, ...]], Mapping[str, Changed] | None]


def _nothing(_: tuple[str, ...]) -> None:
    return None


@dataclass
class Walk:
    """A walk of `windows` of token ids through a causal or bidirectional transformer in float32.

    modules: the linears whose inputs are wanted. sees: what later layers read. stream: runs the model layer
    by layer, where its weights aren't in memory. room: bytes of hidden states that stay in memory.
    device: torch's, that multiplies statistics out; forward passes are the processor's in any case.
    head: visited last, where its input is wanted, as `HEAD`.
    """

    model: nn.Module
    modules: frozenset[str]
    windows: Sequence[Int64]
    sees: Sees = "original"
    progress: Progress = silent
    stream: LayerStream | None = None
    room: int = ROOM
    device: str = "cpu"
    head: OutputHead | None = None

    def run(self, answer: Answer, recall: Recall = _nothing) -> None:
        """Visit every input once, in the order of computation, but for those that `recall` knows.

        Raises DataError without any text, or when the model has no stack of layers that this can walk,
        OutputError when hidden states are many and the disk of temporary files is full.
        """
        if not self.windows:
            raise DataError("there is no text to calibrate with; give a longer file")
        room = Room(self.room)
        with torch.inference_mode():
            stack, hidden = self._opened(room)
            original = _copied(hidden, room) if self.sees == "inputs" else hidden
            plan: GroupPlan | None = None
            for index in range(len(stack.layers)):
                self.progress("calibrating", index, len(stack.layers))
                with stack.placed(index):
                    layer = Layer(stack, index)
                    if self.sees == "original":
                        _plain(layer, hidden, answer, recall, self.device)
                    else:
                        plan = GroupPlan.of(layer, original, plan)
                        _following(layer, plan, hidden, original, room, answer, recall, self.device)
            if self.head is not None and recall((HEAD,)) is None:
                answer(self._head(self.head, stack, hidden, original))
            self.progress("calibrating", len(stack.layers), len(stack.layers))

    def _head(
        self, head: OutputHead, stack: Stack, hidden: HiddenStates, original: HiddenStates
    ) -> LayerInputs:
        """The statistics of what the head reads; hidden, original: what the last layer gives."""
        gram, moved = MeanProduct(self.device), MeanProduct(self.device)
        shapes = [] if self.stream else widths(self.model, stack.layers, self.windows[0])
        placed: dict[str, torch.Tensor] = {}

        def reads(states: HiddenStates, row: int) -> torch.Tensor:
            if self.stream is not None:
                run = Run(self.stream, self.stream.view, self.windows, states)
                return head.reads(lambda: run.end(row, placed))
            window, last = self.windows[row], states[row]
            return head.reads(lambda: after_layers(self.model, stack.layers, shapes, window, last))

        for row in range(len(self.windows)):
            x = reads(hidden, row)
            gram.add(x, x)
            if original is not hidden:
                moved.add(reads(original, row) - x, x)
        following = original is not hidden
        return LayerInputs((HEAD,), gram.value(), gram.count, moved.value() if following else None)

    def _opened(self, room: Room) -> tuple[Stack, HiddenStates]:
        """The layers, how they are called, and what the first one reads."""
        hidden = HiddenStates(room)
        if self.stream is None:
            stack = Stack.find(self.model, self.modules, self.windows)
            for row, states in enumerate(stack.first_inputs(self.model, self.windows)):
                hidden[row] = states
            return stack, hidden
        stream = self.stream
        run = Run(stream, stream.view, self.windows, hidden)
        run.start({})

        def placed(index: int) -> AbstractContextManager[None]:
            return stream.weights.placed(stream.layers[index].parameters(), {})

        return Stack(stream.name, stream.layers, run.calls, self.modules, placed), hidden


def _copied(hidden: HiddenStates, room: Room) -> HiddenStates:
    found = HiddenStates(room)
    for row in range(len(hidden)):
        found[row] = hidden[row]
    return found


def _plain(layer: Layer, hidden: HiddenStates, answer: Answer, recall: Recall, device: str) -> None:
    """One layer whose changes nothing sees; `hidden` has its outputs in the end."""
    groups = [group for group in layer.groups(hidden[0]) if recall(group) is None]
    firsts = [group[0] for group in groups]
    grams, means = {module: MeanProduct(device) for module in firsts}, {module: Mean() for module in firsts}
    for row in range(len(hidden)):
        inputs, output = layer.inputs(firsts, hidden[row], row, to_the_end=True)
        assert output is not None
        hidden[row] = output
        for module, x in inputs.items():
            grams[module].add(x, x)
            means[module].add(x)
    for group in groups:
        gram, mean = grams.pop(group[0]), means[group[0]].value()
        answer(LayerInputs(group, gram.value(), gram.count, means=(mean, mean, None)))


def _following(
    layer: Layer,
    plan: GroupPlan,
    hidden: HiddenStates,
    original: HiddenStates,
    room: Room,
    answer: Answer,
    recall: Recall,
    device: str,
) -> None:
    """One layer input by input, each with the changes before it; both streams have its outputs in the end."""
    kept = {module: layer.state(module) for group in plan.groups for module in group}
    before = GroupPasses(layer, plan, original, kept, room)
    now = GroupPasses(layer, plan, hidden, dict(kept), room)
    for number, group in enumerate(plan.groups):
        theirs, ours = before.advance(number), now.advance(number)
        changed = recall(group)
        if changed is None:
            changed = answer(_statistics(layer, group, theirs, ours, device))
        now.states |= {module: layer.changed(module, change) for module, change in changed.items()}
    before.advance(len(plan.groups))
    now.advance(len(plan.groups))


def _statistics(
    layer: Layer, group: tuple[str, ...], before: list[HiddenStates], now: list[HiddenStates], device: str
) -> LayerInputs:
    """Those of one input; before, now: what the linears read, and a stream, original and requantized.

    (X - X~)^T X~ costs 2 in^2 operations a token, and W times that as many again as the target has; through
    the outputs of X - X~ it's 4 out in at once with the stream's, and no matrix of (in, in).
    """
    alone = len(group) == 1 and len(now) > 1
    some = now[0][0][:1]
    through = alone and layer.output_of(group[0], some).shape[-1] <= some.shape[-1]
    gram, moved, stream = (MeanProduct(device) for _ in range(3))
    means = Mean(), Mean(), Mean()
    for row in range(len(now[0])):
        x, original = now[0][row], before[0][row]
        gram.add(x, x)
        means[0].add(x)
        means[1].add(original)
        if alone:
            off = before[1][row] - now[1][row]
            means[2].add(off)
            stream.add(off + _product(layer, group[0], original - x) if through else off, x)
        if not through:
            moved.add(original - x, x)
    return LayerInputs(
        group,
        gram.value(),
        gram.count,
        None if through else moved.value(),
        stream.value() if alone else None,
        (means[0].value(), means[1].value(), means[2].value() if alone else None),
    )


def _product(layer: Layer, module: str, x: torch.Tensor) -> torch.Tensor:
    """What a linear gives for x (tokens, in) without its bias: (tokens, out)."""
    found, bias = layer.output_of(module, x), layer.state(module).bias
    return found if bias is None else found - bias


def follow_target(
    weight: Float32, inputs: LayerInputs, share: float, gram: Gram, threads: int = 1
) -> Float32:
    """`weight` (out, in) moved towards the best one for inputs and a stream that changed; `share` of the way.

    W + share * (W D + S)(H + damping)^-1, D = (X - X~)^T X~, H = X~^T X~, S = `inputs.stream`.
    gram: of `inputs.gram`, with its damping. threads: that rows are shared out among, which changes no bit.
    """
    moved, stream = inputs.moved, inputs.stream
    if (moved is None and stream is None) or share == 0:
        return weight
    target: Float32 = weight + np.float32(share) * gram.shift(weight, moved, stream, threads)
    return target
