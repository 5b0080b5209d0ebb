"""`vera-edge sign`: a signature on a bundle that is there."""

from __future__ import annotations

from pathlib import Path

import click

import vera_edge
from vera_edge.cli.show import FOLDER, json_option, out, print_json, progress_bar, quiet_option


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--key", type=FOLDER, help="EC private key, PEM.")
@click.option("--certificate", type=FOLDER, help="The key's certificate, PEM.")
@click.option("--chain", type=FOLDER, multiple=True, help="Certificates between it and the trusted one.")
@click.option("--keyless", is_flag=True, help="Sign by the identity of this CI job; needs the network.")
@quiet_option
@json_option
def sign(
    bundle: Path,
    key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    keyless: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Sign BUNDLE, once every byte of it is verified; an older signature is replaced."""
    if (key is None) != keyless:
        raise click.UsageError("give --key or --keyless, one of them")
    with progress_bar(quiet or as_json) as progress:
        path = vera_edge.sign(
            bundle, key=key, certificate=certificate, chain=chain, keyless=keyless, progress=progress
        )
    if as_json:
        print_json({"bundle": str(bundle), "signature": str(path)})
        return
    out().print(f"{path}: signed")
