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

import torch

from vera_edge.arrays import Float32, Int64
from vera_edge.progress import Progress, silent
from vera_edge.reference.hidden_states import HiddenStates, Room
from vera_edge.reference.streamed import LayerStream, Run, Take, View


@dataclass(frozen=True)
class Exchange:
    """A change of the model that lasts as long as the context that `made` gives.

    layer: the number of the layer that it is in; None for one outside of the layers.
    """

    layer: int | None
    made: Callable[[], AbstractContextManager[None]]


def carried(
    stream: LayerStream,
    view: View,
    windows: Sequence[Int64],
    exchanges: Sequence[Exchange],
    take: Take,
    progress: Progress = silent,
) -> Iterator[tuple[int, int | None, Float32]]:
    """What `take` makes of the model's output: yields (window, None, as it is), (window, exchange, changed).

    Window after window, each as the model is first. exchange: by its place in `exchanges`. A change outside
    of the layers goes the whole way by itself, and begins and ends changed.
    """
    room = Room()
    branches: dict[int, Run] = {}
    with torch.inference_mode():
        base = Run(stream, view, windows, HiddenStates(room))
        base.start({})
        for place, exchange in enumerate(exchanges):
            if exchange.layer is None:
                branches[place] = Run(stream, view, windows, HiddenStates(room))
                with exchange.made():
                    branches[place].start({})
        for index in range(len(stream.layers)):
            progress("measuring layer by layer", index, len(stream.layers))
            _one_layer(index, base, branches, exchanges, lambda: _branch(stream, view, base, room))
    progress("measuring layer by layer", len(stream.layers), len(stream.layers))
    yield from _ends(stream, base, branches, exchanges, take)


def _one_layer(
    index: int,
    base: Run,
    branches: dict[int, Run],
    exchanges: Sequence[Exchange],
    branch_of_base: Callable[[], Run],
) -> None:
    """Every branch through a layer, those that begin in it too."""
    read: dict[str, torch.Tensor] = {}
    for branch in branches.values():
        branch.layer(index, read)
    for place, exchange in enumerate(exchanges):
        if exchange.layer == index:
            branches[place] = branch_of_base()
            with exchange.made():
                branches[place].layer(index, read)
    base.layer(index, read)


def _branch(stream: LayerStream, view: View, base: Run, room: Room) -> Run:
    """Another run, from where `base` is."""
    found = Run(stream, view, base.windows, HiddenStates(room))
    found.calls = base.calls
    for row in range(len(base.windows)):
        found.states[row] = base.states[row]
    return found


def _ends(
    stream: LayerStream, base: Run, branches: dict[int, Run], exchanges: Sequence[Exchange], take: Take
) -> Iterator[tuple[int, int | None, Float32]]:
    read: dict[str, torch.Tensor] = {}
    for row in range(len(base.windows)):
        with torch.inference_mode():
            found = take(base.end(row, read))
        yield row, None, found
        for place, branch in sorted(branches.items()):
            with torch.inference_mode():
                if exchanges[place].layer is None:
                    with exchanges[place].made():  # which may read what comes before the layers, too
                        found = take(branch.end(row, read, stream.first | stream.last))
                else:
                    found = take(branch.end(row, read))
            yield row, place, found
