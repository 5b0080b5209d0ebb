"""The options of commands that take a bundle from elsewhere: whose signature it must carry."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from vera_edge import signing
from vera_edge.cli.show import FOLDER, err


def checks_signature(folder: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command --trusted-keys and --require-signature, which hold the bundle in parameter `folder`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def checked(
            *,
            trusted_keys: Path | None,
            trusted_identity: tuple[str, str] | None,
            require_signature: bool,
            **words: Any,
        ) -> None:
            trust = signing.Trust(trusted_keys, require_signature, trusted_identity)
            signature = signing.check(words[folder], trust)
            if signature is not None:
                err().print(f"signed by {signature.by}")
            elif trusted_keys is not None or trusted_identity is not None:
                err().print(f"{words[folder]} isn't signed; --require-signature refuses it")
            command(**words)

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
        return keys(identity(required(checked)))

    return decorate
