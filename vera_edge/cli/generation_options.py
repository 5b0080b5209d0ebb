"""How text is generated, as options: what `run` and `chat` have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as a person may write them


def takes_generation(max_tokens: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `Session.generate`, under the library's names."""
    options = (
        click.option(
            "--max-tokens", default=max_tokens, show_default=True, help="Stop after this many tokens."
        ),
        click.option(
            "--temperature",
            default=0.0,
            show_default=True,
            help="0 takes the most likely token each time.",
        ),
        click.option(
            "--top-k", default=0, show_default=True, help="Draw among the k most likely tokens; 0: all."
        ),
        click.option(
            "--top-p", default=1.0, show_default=True, help="Draw among the likeliest tokens that hold p."
        ),
        click.option(
            "--min-p", default=0.0, show_default=True, help="Drop tokens below p times the likeliest one."
        ),
        click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: repeat less."),
        click.option("--seed", type=int, help="The same seed draws the same text."),
        click.option(
            "--speculate",
            type=click.IntRange(0, 16),
            default=0,
            metavar="N",
            help="Look ahead for N tokens where the text repeats itself: faster, and the same text.",
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Can be repeated."),
        click.option("--system", metavar="TEXT", help="A system message before the prompt."),
        click.option(
            "--template-arg",
            "template_args",
            multiple=True,
            callback=_values,
            metavar="NAME=VALUE",
            help="A variable of the chat template, such as enable_thinking=false; JSON, else text. Can be "
            "repeated.",
        ),
    )

    def given(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return given


def _values(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE by name; a value is JSON where it reads as such, Python's True, False and None included."""
    values: dict[str, Any] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not (name.isidentifier() and equals) or name in values:
            raise click.BadParameter(f"{entry!r} isn't NAME=VALUE with a name that is new")
        try:
            values[name] = json.loads(_PYTHON.get(text, text))
        except (ValueError, RecursionError):
            values[name] = text
    return values
