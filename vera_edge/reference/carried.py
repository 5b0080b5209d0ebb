"""Changes of a streamed model, each alone, in one pass over its weights.

A change in a layer leaves the layers before it as they are, so that a changed model begins as a branch of the
unchanged one where that reads the layer. From there all branches go through each layer while its weights are
in memory: as many passes of a layer as running each changed model from its change on takes, and every weight
is read once. What it costs is room, for hidden states of every branch (on disk where they are many).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vera_edge.arrays import Int64
from vera_edge.progress import Progress, silent
from vera_edge.reference.hidden_states import HiddenStates, Room
from vera_edge.reference.streamed import LayerStream, Run, View

T = TypeVar("T")
# A change of the model, for as long as the context lasts. It is given the unchanged model's run, which stands
# before the layer, whose weights are in their place. None: nothing changes.
Made = Callable[[Run], AbstractContextManager[None] | None]


@dataclass(frozen=True)
class Exchange:
    """A change of the model. layer: the number of the layer that it is in; None for one outside of them.

    That one is `made` before the first layer, and behind the last one where it doesn't have an own `end`.
    """

    layer: int | None
    made: Made
    end: Made | None = None


@dataclass(frozen=True)
class Carried:
    """A streamed model in a view over windows, and exchanges that are carried along. what: is in progress."""

    stream: LayerStream
    view: View
    windows: Sequence[Int64]
    exchanges: Sequence[Exchange]
    what: str = "measuring layer by layer"

    def outputs(
        self, take: Callable[[Any], T], progress: Progress = silent
    ) -> Iterator[tuple[int, int | None, T]]:
        """What `take` makes of the model's output: (window, None, as it is), (window, exchange, changed).

        Window after window, each as the model is first. exchange: by its place in `exchanges`; one that
        changes nothing is left out. One outside of the layers goes the whole way by itself.
        """
        room, layers = Room(), self.stream.layers
        with torch.inference_mode():
            base, branches = self._run(room), dict[int, Run]()
            base.start({})
            for place, exchange in enumerate(self.exchanges):
                if exchange.layer is None and (change := exchange.made(base)) is not None:
                    branches[place] = self._run(room)
                    with change:
                        branches[place].start({})
            for index in range(len(layers)):
                progress(self.what, index, len(layers))
                read: dict[str, torch.Tensor] = {}
                with self.stream.weights.placed(layers[index].parameters(), read):
                    self._layer(index, base, branches, read, room)
        progress(self.what, len(layers), len(layers))
        yield from self._ends(base, branches, take)

    def _run(self, room: Room) -> Run:
        return Run(self.stream, self.view, self.windows, HiddenStates(room))

    def _branch(self, base: Run, room: Room) -> Run:
        """Another run, from where `base` stands."""
        found = self._run(room)
        found.calls = base.calls
        for row in range(len(self.windows)):
            found.states[row] = base.states[row]
        return found

    def _layer(
        self, index: int, base: Run, branches: dict[int, Run], read: dict[str, torch.Tensor], room: Room
    ) -> None:
        """Every branch through a layer, those that begin in it too."""
        for branch in branches.values():
            branch.layer(index, read)
        for place, exchange in enumerate(self.exchanges):
            if exchange.layer == index and (change := exchange.made(base)) is not None:
                branches[place] = self._branch(base, room)
                with change:
                    branches[place].layer(index, read)
        base.layer(index, read)

    def _ends(
        self, base: Run, branches: dict[int, Run], take: Callable[[Any], T]
    ) -> Iterator[tuple[int, int | None, T]]:
        read: dict[str, torch.Tensor] = {}
        for row in range(len(self.windows)):
            with torch.inference_mode():
                found = take(base.end(row, read))
            yield row, None, found
            for place, branch in sorted(branches.items()):
                with torch.inference_mode():
                    found = self._end(branch, self.exchanges[place], row, base, read, take)
                yield row, place, found

    def _end(
        self,
        branch: Run,
        exchange: Exchange,
        row: int,
        base: Run,
        read: dict[str, torch.Tensor],
        take: Callable[[Any], T],
    ) -> T:
        if exchange.layer is not None:
            return take(branch.end(row, read))
        # What is changed may read what comes before the layers, too.
        needed = None if exchange.end else self.stream.first | self.stream.last
        change = (exchange.end or exchange.made)(base)
        assert change is not None
        with change:
            return take(branch.end(row, read, needed))
