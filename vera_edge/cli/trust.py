"""The options of commands that take a bundle from elsewhere: whose signature it must carry."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from vera_edge.cli.show import FOLDER


def takes_trust(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say whose signature a bundle must carry, as the library names them."""
    keys = click.option(
        "--trusted-keys",
        type=FOLDER,
        envvar="VERA_EDGE_TRUSTED_KEYS",
        help="A public key or an issuer's certificate (PEM), or a folder of them; the bundle must carry a "
        "signature of one of theirs.",
    )
    identity = click.option(
        "--trusted-identity",
        type=(str, str),
        metavar="WHO ISSUER",
        help="Who must have signed where it wasn't a trusted key, and the URL of who vouched for it; needs "
        "the network.",
    )
    required = click.option(
        "--require-signature",
        is_flag=True,
        help="Refuse a bundle without a trusted signature also where no key is named.",
    )
    allowed = click.option(
        "--allow-unsigned",
        is_flag=True,
        help="Let a bundle without a signature pass although trusted keys are named.",
    )
    return keys(identity(required(allowed(_checked(command)))))


def _checked(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def checked(*, require_signature: bool, allow_unsigned: bool, **words: Any) -> None:
        if require_signature and allow_unsigned:
            raise click.UsageError("--require-signature and --allow-unsigned contradict each other")
        command(require_signature=require_signature, allow_unsigned=allow_unsigned, **words)

    return checked
