"""`vera_edge.install`, `update`, `rollback`, `patch`: versions of a bundle on a device."""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath
from vera_edge.api.int8_warning import warn_of_int8
from vera_edge.api.trust import check_signature, trust_in
from vera_edge.bundle import contents
from vera_edge.bundle.signing import Trust
from vera_edge.device.deploy.install import Accept, Installed, make_patch
from vera_edge.device.deploy.install import install as install_bundle
from vera_edge.device.deploy.install import rollback as roll_back
from vera_edge.errors import DriftExceeded
from vera_edge.progress import Progress, Tell, silent, unheard

__all__ = ["Installed", "install", "patch", "rollback", "update"]


def install(
    src: StrPath,
    dst: StrPath,
    *,
    validate: bool = False,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Installed:
    """Install a bundle and switch `dst/current` to it, atomically; the last good version is kept.

    What the bundle ships as a seed or as NF4 is expanded on the way.

    Args:
        src: the bundle's folder.
        dst: where versions of it are kept.
        validate: run its golden vectors first, and keep the old version if they fail.
        trusted_keys, trusted_identity, require_signature, allow_unsigned: as in `verify`.
        progress: called with what is done, how much of it, and of how much (bytes).
        tell: given a sentence: who signed it.

    Returns:
        An Installed: the version's folder, its digest, the version before, and the bytes copied.

    Raises:
        BundleError: `src` is damaged, or isn't signed by whom it must.
        DriftExceeded: it fails on this device; the old version stays.
        OutputError: the disk is too small or can't be written.

    Example:
        >>> installed = vera_edge.install("bundle", "device")
        >>> installed.changed, vera_edge.read_manifest("device/current").digest == installed.digest
        (True, True)
    """
    trust = trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned)
    accept = _accept(validate, trust, tell)
    return _told(install_bundle(Path(src), Path(dst), accept, progress=progress))


def update(
    patch: StrPath,
    dst: StrPath,
    *,
    validate: bool = False,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Installed:
    """Update what is installed in `dst` by a patch, which brings only the files that changed.

    Args:
        patch: the folder that `vera_edge.patch` wrote.
        dst, validate, trusted_keys, ...: all as in `install`.

    Returns:
        An Installed; see `install`.

    Raises:
        BundleError: the patch isn't for the version that runs. All else as `install`.

    Example:
        >>> runs = vera_edge.install("bundle", "device"), vera_edge.patch("bundle", "newer", out="small")
        >>> vera_edge.update("small", "device").changed
        True
    """
    trust = trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned)
    accept = _accept(validate, trust, tell)
    return _told(install_bundle(Path(patch), Path(dst), accept, partial=True, progress=progress))


def rollback(
    dst: StrPath,
    *,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Installed:
    """Switch `dst/current` back to the version before, once every byte of it is verified.

    Args:
        dst: where versions of a bundle are kept.
        trusted_keys, trusted_identity, require_signature, allow_unsigned, progress, tell: as in `install`.

    Returns:
        An Installed; see `install`.

    Raises:
        BundleError: there is no version before, or it is damaged, or isn't signed by whom it must.

    Example:
        >>> first, second = vera_edge.install("bundle", "device"), vera_edge.install("newer", "device")
        >>> vera_edge.rollback("device").digest == first.digest
        True
    """
    trust = trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned)
    return _told(roll_back(Path(dst), progress, _accept(False, trust, tell)))


def patch(
    old: StrPath,
    new: StrPath,
    *,
    out: StrPath,
    force: bool = False,
    progress: Progress = silent,
) -> int:
    """Write what a device that runs the bundle `old` needs to run `new`: often a few kilobytes.

    Args:
        old, new: the bundles' folders.
        out: the folder to write, whole or not at all, for `update`.
        force: replace `out` where it exists.
        progress: called with what is done, how much of it, and of how much (bytes).

    Returns:
        The bytes of the files in it.

    Raises:
        BundleError: a bundle is damaged.
        OutputError: `out` exists or can't be written.

    Example:
        >>> size = vera_edge.patch("bundle", "newer", out="small")
        >>> size < vera_edge.read_manifest("newer").size
        True
    """
    return make_patch(Path(old), Path(new), Path(out), force, progress)


def _accept(validate: bool, trust: Trust, tell: Tell) -> Accept:
    """What looks at the complete copy of a version before it becomes current."""

    def accept(folder: Path) -> None:
        check_signature(folder, trust, tell)
        if not validate:
            return
        from vera_edge.device.check.validate import validate as run  # the runtime comes with it

        if failed := [check for check in run(folder).checks if not check.passed]:
            raise DriftExceeded(
                f"the new version fails on this device ({failed[0].name}: {failed[0].detail}); the old stays"
            )

    return accept


def _told(installed: Installed) -> Installed:
    """Warn of what other programs would compute wrongly here."""
    warn_of_int8(contents.read(installed.folder))
    return installed
