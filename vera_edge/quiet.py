"""Other libraries at work: their talk kept off the terminal, their errors cut to a line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def first_line(cause: Exception) -> str:
    """The first line of another library's message, which may run over many."""
    return str(cause).strip().split("\n")[0].rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers', PEFT's and bitsandbytes' bars and advice off the terminal while they load."""
    import transformers

    theirs = transformers.utils.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "peft")]
    levels = [logger.level for logger in loggers]
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
