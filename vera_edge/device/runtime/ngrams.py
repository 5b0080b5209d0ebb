"""What may come next in a text by what came before: the tokens behind the last place that ended as it ends.

Saxena, Prompt Lookup Decoding, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from vera_edge.arrays import Tokens

_LENGTHS = (4, 3, 2)  # tokens that must agree; the longest that is found decides


class EarlierTokens:
    """A growing text and where each run of its last tokens stood before."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # behind which token a run ended last
        self._known = 0  # tokens whose runs are noted, the last one's not

    def next(self, text: Tokens, count: int) -> list[int]:
        """`count` tokens that may follow `text` (n,), which begins as at the last call; none, or all.

        Where the earlier place is less than `count` tokens back what stands between is repeated.
        """
        words = text[max(0, self._known - max(_LENGTHS)) :].tolist()
        first = len(text) - len(words)
        for end in range(self._known, len(text)):
            for length in _LENGTHS:
                if end >= length:
                    self._ends[tuple(words[end - length - first : end - first])] = end
        self._known = len(text)
        for length in _LENGTHS:
            found = self._ends.get(tuple(words[-length:])) if len(text) >= length else None
            if found is not None:
                back = len(text) - found
                return [int(text[found + i % back]) for i in range(count)]
        return []
