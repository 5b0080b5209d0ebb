"""`vera-edge verify`: is a bundle whole?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import vera_edge
from vera_edge.cli.show import FOLDER, json_option, out, print_json, progress_bar, quiet_option, tell
from vera_edge.cli.trust import takes_trust


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--fast", is_flag=True, help="Don't read files over 64 MiB; their size is checked.")
@json_option
@quiet_option
@takes_trust
def verify(bundle: Path, fast: bool, as_json: bool, quiet: bool, **trust: Any) -> None:
    """Check every file of BUNDLE against its manifest, offline."""
    with progress_bar(quiet or as_json) as progress:
        manifest = vera_edge.verify(bundle, fast=fast, progress=progress, tell=tell, **trust)
    if as_json:
        print_json(manifest.to_dict() | {"digest": manifest.digest, "verified": True})
        return
    adapters = ", ".join(manifest.adapters) or "none"
    files = [name for name in manifest.generated if not manifest.path(name).is_file()]
    absent = f"{', '.join(files)}: made by `vera-edge install`\n" if files else ""
    out().print(
        f"{bundle}: sound\n"
        f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB; {manifest.kind}, {manifest.mode}, "
        f"{manifest.weights}; adapters: {adapters}\n{absent}digest {manifest.digest}"
    )
