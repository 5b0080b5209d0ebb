"""Other libraries at work: kept off the network, their talk off the terminal, their errors cut to a line."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_OFFLINE = "HF_HUB_OFFLINE"


def first_line(cause: BaseException) -> str:
    """The first line of another library's message, which may run over many."""
    return str(cause).strip().split("\n")[0].rstrip(".")


@contextmanager
def offline() -> Iterator[None]:
    """Keep huggingface_hub, and what looks things up through it, off the network in this process."""
    from huggingface_hub import constants

    # The variable is read once, when the package is imported; it is for processes that start meanwhile.
    before, constant = os.environ.get(_OFFLINE), constants.HF_HUB_OFFLINE
    os.environ[_OFFLINE], constants.HF_HUB_OFFLINE = "1", True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = constant
        if before is None:
            os.environ.pop(_OFFLINE, None)
        else:
            os.environ[_OFFLINE] = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers, PEFT and bitsandbytes off the network, and their talk off the terminal."""
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
        with offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
