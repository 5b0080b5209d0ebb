"""`vera-edge verify`: is a bundle whole?"""

from __future__ import annotations

from pathlib import Path

import click

from vera_edge.bundle import contents as bundles
from vera_edge.cli.show import FOLDER, json_option, out, print_json, progress_bar, quiet_option, warn_of_int8
from vera_edge.cli.trust import checks_signature


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--fast", is_flag=True, help="Don't read files over 64 MiB; their size is checked.")
@json_option
@quiet_option
@checks_signature("bundle")
def verify(bundle: Path, fast: bool, as_json: bool, quiet: bool) -> None:
    """Check every file of BUNDLE against its manifest, offline."""
    with progress_bar(quiet or as_json) as progress:
        manifest = bundles.verify(bundle, deep=not fast, progress=progress)
    warn_of_int8(manifest)
    if as_json:
        print_json(bundles.as_json(manifest) | {"digest": manifest.digest, "verified": True})
        return
    adapters = ", ".join(manifest.adapters) or "none"
    files = [name for name in manifest.generated if not manifest.path(name).is_file()]
    absent = f"{', '.join(files)}: made by `vera-edge install`\n" if files else ""
    out().print(
        f"{bundle}: sound\n"
        f"{len(manifest.files)} files, {manifest.size / 1e6:.1f} MB; {manifest.kind}, {manifest.mode}, "
        f"{manifest.weights}; adapters: {adapters}\n{absent}digest {manifest.digest}"
    )
