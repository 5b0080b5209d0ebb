"""The options of commands that take a bundle from elsewhere: whose signature it must carry."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from vera_edge.bundle import signing
from vera_edge.cli.show import FOLDER, err


def check_signature(folder: Path, trust: signing.Trust) -> None:
    """Hold a bundle to `trust`, as `signing.check` does, and say on stderr who signed it."""
    signature = signing.check(folder, trust)
    if signature is not None:
        err().print(f"signed by {signature.by}")
    elif trust.keys is not None or trust.identity is not None:
        err().print(f"{folder} isn't signed, which --allow-unsigned lets pass")


def takes_trust(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say whose signature a bundle must carry, as its parameter `trust`."""

    @wraps(command)
    def trusting(
        *,
        trusted_keys: Path | None,
        trusted_identity: tuple[str, str] | None,
        require_signature: bool,
        allow_unsigned: bool,
        **words: Any,
    ) -> None:
        if require_signature and allow_unsigned:
            raise click.UsageError("--require-signature and --allow-unsigned contradict each other")
        named = trusted_keys is not None or trusted_identity is not None
        required = require_signature or (named and not allow_unsigned)
        command(trust=signing.Trust(trusted_keys, required, trusted_identity), **words)

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
    return keys(identity(required(allowed(trusting))))


def checks_signature(folder: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`takes_trust` for a command that works on the bundle in its parameter `folder`, which is held to it."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def checked(*, trust: signing.Trust, **words: Any) -> None:
            check_signature(words[folder], trust)
            command(**words)

        return takes_trust(checked)

    return decorate
