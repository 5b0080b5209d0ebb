"""What looking ahead for tokens gains on three kinds of text, in turns with generating without.

python -m scripts.bench_speculation BUNDLE...   prints a table in Markdown

Processor time of one thread, since that leaves out what else the machine does. Texts are checked to be equal.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from scripts.bench_turns import say
from vera_edge.device.check.bench import ratio_of_medians
from vera_edge.device.check.hardware import processor
from vera_edge.device.runtime.generate import Generation
from vera_edge.device.runtime.session import Session

_ARTICLE = (
    "The tide mill stands where the creek meets the estuary. At high water the miller opened the gate "
    "and let the sea fill the pond behind the dam; when the tide had fallen he let the pond run out "
    "below the wheel. So the mill worked twice a day, at hours that moved with the moon, and the "
    "miller slept when he could. In the year 1780 the dam broke in a storm, and the parish paid for "
    "oak from the forest to mend it. The mill ground wheat and barley until 1954, when the last "
    "miller retired. Since then the tide mill has been a museum: volunteers open the gate on Sundays, "
    "and visitors take home flour in paper bags."
)
_CODE = (
    "Write this Python class again with a docstring in every method:\n\nclass Account:\n"
    "    def __init__(self, owner, balance=0):\n        self.owner = owner\n"
    "        self.balance = balance\n\n"
    "    def deposit(self, amount):\n        if amount <= 0:\n"
    '            raise ValueError("amount must be positive")\n        self.balance += amount\n\n'
    "    def withdraw(self, amount):\n        if amount > self.balance:\n"
    '            raise ValueError("not enough money")\n        self.balance -= amount\n'
)
KINDS = {
    "code, written again": _CODE,
    "summary of the prompt": f"Summarize this text in a few sentences:\n\n{_ARTICLE}",
    "free prose": "Write a long story about a lighthouse keeper who finds a letter.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--ahead", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    given = parser.parse_args()
    say("| bundle | text | ahead | a step costs | tokens a step | ratio | 95 % |")
    say("|---|---|--:|--:|--:|--:|---|")
    for folder in given.bundles:
        session = Session.open(folder, threads=1, deep=False)
        for ahead in given.ahead:
            cost = session.look_ahead(ahead).cost
            for kind, prompt in KINDS.items():
                cells = _row(session, prompt, ahead, given.rounds, given.tokens)
                say(f"| {folder.name} | {kind} | {ahead} | {cost:.2f} | {' | '.join(cells)} |")
    load, cores = os.getloadavg()[0], os.cpu_count()
    say(f"\n{given.rounds} rounds in turns, 1 thread on {cores} cores of {processor()[0]}, load {load:.1f}.")


def _row(session: Session, prompt: str, ahead: int, rounds: int, tokens: int) -> list[str]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        plain, alone = _timed(lambda: session.generate(prompt, max_tokens=tokens))
        many, together = _timed(lambda: session.generate(prompt, max_tokens=tokens, speculate=ahead))
        if plain.tokens != many.tokens:
            raise SystemExit(f"{ahead} tokens ahead changed the text")
        if number:
            seconds[0].append(alone)
            seconds[1].append(together)
    found = many.summary()["speculation"]
    ratio, low, high = ratio_of_medians(*seconds)
    a_step = len(many.tokens) / max(1, found["steps"])
    return [f"{a_step:.2f}", f"**{ratio:.2f}**", f"{low:.2f} to {high:.2f}"]


def _timed(begin: Callable[[], Generation]) -> tuple[Generation, float]:
    """A generation that has run, and the processor time of its tokens after the first."""
    generation = begin()
    next(generation, None)
    begun = time.process_time()
    for _ in generation:
        pass
    return generation, time.process_time() - begun


if __name__ == "__main__":
    main()
