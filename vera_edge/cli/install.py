"""`vera-edge install`, `update`, `rollback`, `patch`: versions of a bundle on a device."""

from __future__ import annotations

from pathlib import Path

import click

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.signing import Trust
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    out,
    print_json,
    progress_bar,
    quiet_option,
    warn_of_int8,
)
from vera_edge.cli.trust import check_signature, takes_trust
from vera_edge.device.deploy.install import Accept, Installed, make_patch
from vera_edge.device.deploy.install import install as install_bundle
from vera_edge.device.deploy.install import rollback as roll_back
from vera_edge.errors import DriftExceeded

_validate_option = click.option(
    "--validate",
    "validated",
    is_flag=True,
    help="Run its golden vectors first; keep the old one if they fail.",
)


@click.command()
@click.argument("src", type=FOLDER)
@click.argument("dst", type=FOLDER)
@_validate_option
@json_option
@quiet_option
@takes_trust
def install(src: Path, dst: Path, validated: bool, as_json: bool, quiet: bool, trust: Trust) -> None:
    """Install the bundle SRC into DST and switch DST/current to it; the last good version is kept."""
    with progress_bar(quiet or as_json) as progress:
        _show(install_bundle(src, dst, _accept(validated, trust), progress=progress), as_json)


@click.command()
@click.argument("patch", type=FOLDER)
@click.argument("dst", type=FOLDER)
@_validate_option
@json_option
@quiet_option
@takes_trust
def update(patch: Path, dst: Path, validated: bool, as_json: bool, quiet: bool, trust: Trust) -> None:
    """Update what is installed in DST by PATCH, which brings only the files that changed."""
    with progress_bar(quiet or as_json) as progress:
        accept = _accept(validated, trust)
        _show(install_bundle(patch, dst, accept, partial=True, progress=progress), as_json)


@click.command()
@click.argument("dst", type=FOLDER)
@json_option
@quiet_option
@takes_trust
def rollback(dst: Path, as_json: bool, quiet: bool, trust: Trust) -> None:
    """Switch DST/current back to the version before, once every byte of it is verified."""
    with progress_bar(quiet or as_json) as progress:
        _show(roll_back(dst, progress, _accept(False, trust)), as_json)


@click.command()
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.option("-o", "--output", "--out", type=FOLDER, required=True, help="The folder to write.")
@force_option
@json_option
@quiet_option
def patch(old: Path, new: Path, output: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write what a device that runs the bundle OLD needs to run NEW: often a few kilobytes."""
    with progress_bar(quiet or as_json) as progress:
        size = make_patch(old, new, output, force, progress)
    if as_json:
        print_json({"folder": str(output), "size": size})
        return
    out().print(f"{output}: {size / 1e3:.1f} KB of files; apply it with `vera-edge update {output} DST`")


def _accept(validated: bool, trust: Trust) -> Accept:
    """What looks at the complete copy of a version before it becomes current."""

    def accept(folder: Path) -> None:
        check_signature(folder, trust)
        if not validated:
            return
        from vera_edge.device.check.validate import validate

        result = validate(folder)
        if failed := [check for check in result.checks if not check.passed]:
            raise DriftExceeded(
                f"the new version fails on this device ({failed[0].name}: {failed[0].detail}); the old stays"
            )

    return accept


def _show(result: Installed, as_json: bool) -> None:
    warn_of_int8(bundle.read(result.folder))
    previous = result.previous.name if result.previous else None
    if as_json:
        print_json(
            {
                "folder": str(result.folder),
                "digest": result.digest,
                "previous": previous,
                "changed": result.changed,
                "copied": result.copied,
            }
        )
        return
    state = "runs now" if result.changed else "ran already"
    out().print(
        f"{result.folder.name} {state}; {result.copied / 1e6:.2f} MB copied; "
        f"before it: {previous or 'nothing'}\ndigest {result.digest}"
    )
