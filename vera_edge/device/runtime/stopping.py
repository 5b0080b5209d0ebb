"""Stop strings: text is let through up to the first one, special tokens in it included.

Special tokens (`<|im_end|>`) aren't shown, yet a stop string may be one, hold one, or go past one that isn't
in it. So a stop string is looked for in the text that is shown, and in the one with special tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vera_edge.device.runtime.chat import BundleText, TextStream
from vera_edge.errors import DataError


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """`stop` as strings, one or several, without empty ones. Raises DataError on anything else."""
    given = (stop,) if isinstance(stop, str) else tuple(stop)
    if wrong := [entry for entry in given if not isinstance(entry, str)]:
        raise DataError(f"stop holds {wrong[0]!r}; give texts to stop before")
    return tuple(entry for entry in given if entry)


class StoppedText:
    """Tokens in, the text to show out; `stopped` once a stop string came."""

    def __init__(self, text: BundleText, stops: Sequence[str]) -> None:
        self._text, self._stream, self._gate = text, TextStream(text), StopGate(stops)

    @property
    def stopped(self) -> bool:
        return self._gate.closed

    def push(self, token: int) -> str:
        """Add a token; what may be shown now, perhaps nothing."""
        piece = self._gate.push(self._stream.push(token))
        return piece + self._gate.push(self._text.special_tokens.get(token, ""), shown=False)

    def end(self, token: int | None = None) -> str:
        """The last that may be shown, once no token follows; `token` ended the text and isn't shown."""
        piece = self._gate.push(self._stream.flush())
        if token is not None:
            piece += self._gate.push(self._text.text([token], special=True), shown=False)
        return piece + self._gate.flush()


class StopGate:
    """Lets text through up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        # What may be part of a stop string that isn't complete: characters, and whether each is shown.
        self._held = ""
        self._shown: list[bool] = []
        self.closed = False

    def push(self, piece: str, shown: bool = True) -> str:
        """What may be shown now that `piece` came; after a stop string `closed` is true.

        shown: False for a special token written out, which a stop string may hold and nobody sees.
        """
        if self.closed or not piece:
            return ""
        self._held += piece
        self._shown += [shown] * len(piece)
        visible = [at for at, seen in enumerate(self._shown) if seen]
        text = "".join(self._held[at] for at in visible)
        starts = [visible[at] for stop in self._stops if (at := text.find(stop)) >= 0]
        starts += [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.closed = True
            return self._release(min(starts))
        starts = [visible[len(text) - size] for stop in self._stops if (size := _overlap(text, stop))]
        starts += [len(self._held) - size for stop in self._stops if (size := _overlap(self._held, stop))]
        return self._release(min(starts, default=len(self._held)))

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        return "" if self.closed else self._release(len(self._held))

    def _release(self, stop: int) -> str:
        """Take the first `stop` characters out and return those of them that are shown."""
        released = "".join(self._held[at] for at in range(stop) if self._shown[at])
        self._held, self._shown = self._held[stop:], self._shown[stop:]
        return released


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
