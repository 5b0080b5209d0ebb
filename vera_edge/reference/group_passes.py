"""A text through one layer, one group of linears after the other, each linear multiplied once.

Between two groups the caller changes the weights of the first. So the layer is run again for every group, up
to what that reads; linears before it give what is known of them. Which of those matter is found by looking: a
linear that can give something else without a trace in what is wanted needn't give anything right, and
attention that only such ones go into needn't be computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vera_edge.reference.hidden_states import HiddenStates, Room
from vera_edge.reference.layers import Layer, LinearState


@dataclass(frozen=True)
class GroupPlan:
    """How a layer is run group by group. groups: linears that read one input each, in the order they do.

    wanted: for each group its first linear and the parts to whose inputs a sum of it is added. needed: for
    each group, and for the layer's output, the linears before it whose outputs it depends on, those that do
    by way of others left out. None where the layer doesn't bear it: then all of it is run each time.
    blind: those for which what attention gives doesn't matter either.
    """

    groups: tuple[tuple[str, ...], ...]
    wanted: tuple[tuple[str, ...], ...]
    needed: tuple[frozenset[str], ...] | None = None
    widths: Mapping[str, int] = field(default_factory=dict)  # of what linears give
    blind: frozenset[int] = frozenset()

    @classmethod
    def of(cls, layer: Layer, states: HiddenStates, like: GroupPlan | None = None) -> GroupPlan:
        """Look at a layer that reads `states`: at the longest of the texts, in which most shows.

        like: the plan of a layer before it, which is taken over where it holds for this one too.
        """
        row = max(range(len(states)), key=lambda number: (states[number].numel(), -number))
        hidden = states[row]
        groups, added_to = layer.groups(hidden, row), layer.added_to(hidden, row)
        wanted = tuple(
            (group[0], *dict.fromkeys(added_to[module] for module in group if module in added_to))
            for group in groups
        )
        plan = cls(tuple(groups), wanted)
        modules = plan.before(len(groups))
        if len(set(modules)) < len(modules):
            return plan
        look, guess, needed, blind = _Look(layer, plan, hidden, row), plan.renamed(like), [], set()
        for target in range(len(groups) + 1):
            found = None if guess is None else guess[target]
            without = like is not None and target in like.blind
            if found is None or not look.holds(target, found, without):
                found = look.needed(target)
                without = found is not None and look.holds(target, found, without=True)
            if found is None:
                return plan
            needed.append(found)
            blind |= {target} if without and len(found) < len(plan.before(target)) else set()
        widths = {module: look.outputs[module].shape[-1] for module in modules}
        return cls(plan.groups, wanted, tuple(needed), widths, frozenset(blind))

    def before(self, target: int) -> list[str]:
        """The linears of the groups before this one."""
        return [module for group in self.groups[:target] for module in group]

    def renamed(self, like: GroupPlan | None) -> tuple[frozenset[str], ...] | None:
        """What another plan needs, by the names of this one's linears; None where they are others."""
        if like is None or like.needed is None or [*map(len, like.groups)] != [*map(len, self.groups)]:
            return None
        count = len(self.groups)
        names = dict(zip(like.before(count), self.before(count), strict=True))
        return tuple(frozenset(names[module] for module in needed) for needed in like.needed)

    def run(
        self, layer: Layer, hidden: torch.Tensor, row: int, target: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What is wanted of the group `target`, or behind the last one the layer's output."""
        spared = self.needed is not None and target in self.blind
        with _NoAttention() if spared else nullcontext():
            if target == len(self.groups):
                return {}, layer(hidden, row)
            return layer.inputs(self.wanted[target], hidden, row)


class _Look:
    """One text through a layer, to see what depends on what."""

    def __init__(self, layer: Layer, plan: GroupPlan, hidden: torch.Tensor, row: int) -> None:
        self._layer, self._plan, self._hidden, self._row = layer, plan, hidden, row
        self.outputs = layer.outputs(hidden, row)
        parts = list(dict.fromkeys(part for parts in plan.wanted for part in parts))
        reads, output = layer.inputs(parts, hidden, row, to_the_end=True)
        assert output is not None
        self._expected = [[reads[part] for part in parts] for parts in plan.wanted] + [[output]]

    def needed(self, target: int) -> frozenset[str] | None:
        """See `GroupPlan.needed`; None where what is wanted isn't told by the outputs of linears alone."""
        if not self._same(target, {}):
            return None
        found = frozenset(module for module in self._plan.before(target) if not self._spare(target, [module]))
        return found if self.holds(target, found) else None

    def holds(self, target: int, needed: frozenset[str], without: bool = False) -> bool:
        """Whether nothing but these matters; without: nor what attention gives."""
        rest = [module for module in self._plan.before(target) if module not in needed]
        return self._same(target, {}) and self._spare(target, rest, without)

    def _spare(self, target: int, modules: list[str], without: bool = False) -> bool:
        """Whether it doesn't matter what these linears, and attention, give: zeros, or any numbers."""
        draw = torch.Generator().manual_seed(target)
        zeros = {module: torch.zeros_like(self.outputs[module]) for module in modules}
        others = {
            module: torch.randn(values.shape, generator=draw, dtype=values.dtype)
            for module, values in zeros.items()
        }
        ways = (_NoAttention(), _NoAttention(draw)) if without else (nullcontext(), nullcontext())
        return not modules or (self._same(target, zeros, ways[0]) and self._same(target, others, ways[1]))

    def _same(
        self,
        target: int,
        changed: Mapping[str, torch.Tensor],
        way: AbstractContextManager[Any] | None = None,
    ) -> bool:
        """Whether what is wanted comes out the same where these linears give something else."""
        given = {module: self.outputs[module].clone() for module in self._plan.before(target)}
        with self._layer.giving(given | dict(changed)), way or nullcontext():
            reads, output = self._plan.run(self._layer, self._hidden, self._row, target)
        found = [output] if output is not None else [reads[part] for part in self._plan.wanted[target]]
        return all(torch.equal(one, two) for one, two in zip(found, self._expected[target], strict=True))


class _NoAttention(TorchFunctionMode):
    """While it lasts, scaled dot products of attention aren't computed: zeros, or numbers that are drawn."""

    def __init__(self, draw: torch.Generator | None = None) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention or len(args) < 3:
            return func(*args, **dict(kwargs or {}))
        query, value = args[0], args[2]
        shape = (*query.shape[:-1], value.shape[-1])
        if self._draw is None:
            return query.new_zeros(shape)
        return torch.randn(shape, generator=self._draw, dtype=query.dtype)


class GroupPasses:
    """One stream of hidden states through a layer. `advance` to each group in turn, then to the end.

    Memory: what two groups read and give, in `room`, else on disk.
    """

    def __init__(
        self, layer: Layer, plan: GroupPlan, hidden: HiddenStates, states: dict[str, LinearState], room: Room
    ) -> None:
        self._layer, self._plan, self._hidden, self.states, self._room = layer, plan, hidden, states, room
        self._inputs: HiddenStates | None = None  # of the group that was reached last
        self._outputs: dict[str, HiddenStates] = {}

    def advance(self, target: int) -> list[HiddenStates]:
        """Up to the group `target`: what is wanted of it, by window, in the order of `GroupPlan.wanted`.

        Behind the last group the hidden states take the values of the layer's outputs instead.
        """
        wanted = self._plan.wanted[target] if target < len(self._plan.groups) else ()
        found = [HiddenStates(self._room) for _ in wanted]
        inputs = self._inputs
        self._layer.use(self.states)
        for row in range(len(self._hidden)):
            hidden = self._hidden[row]
            with self._layer.giving(self._known(row, target, inputs, hidden)):
                values, output = self._plan.run(self._layer, hidden, row, target)
            if output is not None:
                self._hidden[row] = output
            for part, states in zip(wanted, found, strict=True):
                states[row] = values[part]
        self._forget(target)
        self._inputs = found[0] if found else None
        return found

    def _known(
        self, row: int, target: int, inputs: HiddenStates | None, hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What linears before a group give: what they must, or where it doesn't matter zeros."""
        if self._plan.needed is None:
            return {}
        needed, given = self._plan.needed[target], {}
        fresh = self._plan.groups[target - 1] if target else ()
        tokens = hidden.numel() // hidden.shape[-1]
        for module in self._plan.before(target):
            if module in fresh and self._last(module) >= target:
                assert inputs is not None
                output = self._layer.output_of(module, inputs[row])
                if self._last(module) > target:
                    self._outputs.setdefault(module, HiddenStates(self._room))[row] = output
                    output = output.clone()
                given[module] = output
            elif module in needed:
                given[module] = self._outputs[module][row].clone()
            else:
                given[module] = hidden.new_zeros(tokens, self._plan.widths[module])
        return given

    def _last(self, module: str) -> int:
        """The last group, or the end, that needs what this linear gives; -1 for none."""
        assert self._plan.needed is not None
        return max((n for n, needed in enumerate(self._plan.needed) if module in needed), default=-1)

    def _forget(self, target: int) -> None:
        if self._plan.needed is None:
            return
        for module in [module for module in self._outputs if self._last(module) <= target]:
            self._outputs.pop(module).close()
