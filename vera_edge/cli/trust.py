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
        err().print(f"{folder} isn't signed; --require-signature refuses it")


def takes_trust(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --trusted-keys, --trusted-identity and --require-signature, as its parameter `trust`."""

    @wraps(command)
    def trusting(
        *,
        trusted_keys: Path | None,
        trusted_identity: tuple[str, str] | None,
        require_signature: bool,
        **words: Any,
    ) -> None:
        command(trust=signing.Trust(trusted_keys, require_signature, trusted_identity), **words)

    keys = click.option(
        "--trusted-keys",
        type=FOLDER,
        envvar="VERA_EDGE_TRUSTED_KEYS",
        help="A public key or an issuer's certificate (PEM), or a folder of them; the bundle's signature "
        "must be one of theirs.",
    )
    identity = click.option(
        "--trusted-identity",
        type=(str, str),
        metavar="WHO ISSUER",
        help="Who may have signed without a key, and the URL of who vouched for it; needs the network.",
    )
    required = click.option(
        "--require-signature", is_flag=True, help="Refuse a bundle that isn't signed by a trusted key."
    )
    return keys(identity(required(trusting)))


def checks_signature(folder: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`takes_trust` for a command that works on the bundle in its parameter `folder`, which is held to it."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def checked(*, trust: signing.Trust, **words: Any) -> None:
            check_signature(words[folder], trust)
            command(**words)

        return takes_trust(checked)

    return decorate
