"""`vera-edge chat`: a conversation in the terminal, or of lines that a script pipes in."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vera_edge
from vera_edge import printable
from vera_edge.cli.generation_options import takes_generation
from vera_edge.cli.show import (
    FOLDER,
    fast_option,
    four_bit_option,
    huge_pages_option,
    note,
    prompt_cache_option,
    reread_option,
    resident_option,
    tell,
)

if TYPE_CHECKING:
    from vera_edge.api.chat import Conversation

_PROMPT = "> "


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--adapter", default="default", metavar="FILE|NAME|none", help="Branch mode: the adapter to run."
)
@takes_generation(max_tokens=1024)
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; all cores by default.")
@fast_option
@reread_option
@prompt_cache_option
@four_bit_option
@resident_option
@huge_pages_option
def chat(bundle: Path, **options: Any) -> None:
    """Talk with the model in BUNDLE, without torch; /help lists what can be changed on the way.

    Ctrl-C stops an answer; twice, or Ctrl-D, leaves. Where the standard input isn't a terminal each of
    its lines is said, and answered on a line of the standard output.
    """
    conversation = vera_edge.chat(bundle, tell=tell, **options)
    if sys.stdin is None or not sys.stdin.isatty():
        for line in sys.stdin or ():
            _show(conversation, conversation.take(line.rstrip("\r\n")))
            if conversation.ended:
                return
        return
    with contextlib.suppress(ValueError):  # of a thread that isn't the main one
        # A shell that started it in the background, and brought it forward since, had it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    tell("/help says what can be changed; Ctrl-D leaves")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (its import gives the prompt a history and editing)
    _converse(conversation)


def _converse(conversation: Conversation) -> None:
    """Ask for lines until the person leaves. What goes wrong with one is told, and the next is asked for."""
    interrupted = False
    while not conversation.ended:
        try:
            line = input(_PROMPT)
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            if interrupted:
                return
            interrupted = True
            tell("Ctrl-C again, or Ctrl-D, leaves")
            continue
        interrupted = False
        forgotten = conversation.forgotten
        answer = conversation.take(line)
        try:
            _show(conversation, answer)
        except KeyboardInterrupt:
            answer.close()  # type: ignore[attr-defined]  # keeps what was said so far
            click.echo()
            interrupted = True
        except vera_edge.VeraEdgeError as error:
            click.echo(f"vera-edge: {error}", err=True)
        if conversation.forgotten > forgotten:
            note("the context is full; what was said first is forgotten")


def _show(conversation: Conversation, answer: Iterator[str]) -> None:
    """Print the pieces as they come, and a line break where there were any."""
    said = False
    for piece in answer:
        click.echo(printable.lines(piece) if sys.stdout.isatty() else piece, nl=False)
        sys.stdout.flush()
        said = said or bool(piece)
    if said:
        click.echo()
