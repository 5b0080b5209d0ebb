"""A text through one layer, one group of linears after the other, each linear multiplied once.

Between two groups the caller changes the weights of the first. So the layer is run again for every group, up
to what that reads; linears before it give what is known of them. Which of those matter is found by looking: a
linear that can give something else without a trace in what is wanted needn't give anything right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vera_edge.reference.hidden_states import HiddenStates, Room
from vera_edge.reference.layers import Layer, LinearState


@dataclass(frozen=True)
class GroupPlan:
    """How a layer is run group by group. groups: linears that read one input each, in the order they do.

    wanted: for each group its first linear and the parts to whose inputs a sum of it is added. needed: for
    each group, and for the layer's output, the linears before it whose outputs it depends on, those that do
    by way of others left out. None where the layer doesn't bear it: then all of it is run each time.
    """

    groups: tuple[tuple[str, ...], ...]
    wanted: tuple[tuple[str, ...], ...]
    needed: tuple[frozenset[str], ...] | None = None
    widths: Mapping[str, int] = field(default_factory=dict)  # of what linears give

    @classmethod
    def of(cls, layer: Layer, states: HiddenStates) -> GroupPlan:
        """Look at a layer that reads `states`: at the longest of the texts, in which most shows."""
        row = max(range(len(states)), key=lambda number: (states[number].numel(), -number))
        hidden = states[row]
        groups, added_to = layer.groups(hidden, row), layer.added_to(hidden, row)
        wanted = tuple(
            (group[0], *dict.fromkeys(added_to[module] for module in group if module in added_to))
            for group in groups
        )
        plan = cls(tuple(groups), wanted)
        modules = [module for group in groups for module in group]
        if len(set(modules)) < len(modules):
            return plan
        outputs = layer.outputs(hidden, row)
        needed = []
        for target in range(len(groups) + 1):
            found = plan._needed(layer, hidden, row, outputs, target)
            if found is None:
                return plan
            needed.append(found)
        widths = {module: outputs[module].shape[-1] for module in modules}
        return cls(plan.groups, wanted, tuple(needed), widths)

    def before(self, target: int) -> list[str]:
        """The linears of the groups before this one."""
        return [module for group in self.groups[:target] for module in group]

    def run(
        self, layer: Layer, hidden: torch.Tensor, row: int, target: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """What is wanted of the group `target`, or behind the last one the layer's output."""
        if target == len(self.groups):
            return {}, layer(hidden, row)
        return layer.inputs(self.wanted[target], hidden, row)

    def _needed(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        row: int,
        outputs: Mapping[str, torch.Tensor],
        target: int,
    ) -> frozenset[str] | None:
        before = self.before(target)
        wanted = _reached(*self.run(layer, hidden, row, target))

        def reached(changed: Mapping[str, torch.Tensor]) -> bool:
            """Whether what is wanted comes out the same where these linears give something else."""
            with layer.giving({module: outputs[module] for module in before} | dict(changed)):
                found = _reached(*self.run(layer, hidden, row, target))
            return all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))

        if not reached({}):
            return None
        draw = torch.Generator().manual_seed(target)
        needed = set()
        for module in before:
            zeros = torch.zeros_like(outputs[module])
            other = torch.randn(zeros.shape, generator=draw, dtype=zeros.dtype)
            if not (reached({module: zeros}) and reached({module: other})):
                needed.add(module)
        rest = {module: torch.zeros_like(outputs[module]) for module in before if module not in needed}
        return frozenset(needed) if reached(rest) else None


def _reached(values: Mapping[str, torch.Tensor], output: torch.Tensor | None) -> list[torch.Tensor]:
    return [*values.values(), *(() if output is None else (output,))]


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
