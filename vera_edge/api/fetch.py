"""`vera_edge.fetch`: a bundle over a slow link, only what is missing here."""

from __future__ import annotations

import os
from pathlib import Path

from vera_edge.api.arguments import StrPath, path_or_none
from vera_edge.api.trust import check_signature, trust_in
from vera_edge.device.deploy.fetch import Fetched
from vera_edge.device.deploy.fetch import fetch as fetch_bundle
from vera_edge.progress import Progress, Tell, silent, unheard

__all__ = ["Fetched", "fetch"]


def fetch(
    source: StrPath,
    *,
    out: StrPath,
    have: StrPath | None = None,
    force: bool = False,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Fetched:
    """Bring a bundle here, from a folder or an HTTP address; an interrupted fetch goes on.

    Any static server will do. With `have` only the chunks that the older version lacks are transferred, where
    the server has byte ranges; one without sends each file that changed once.

    Args:
        source: a folder, or an http:// or https:// address.
        out: the folder to write, whole or not at all.
        have: an older version; what it holds isn't transferred again.
        force: replace `out` where it exists.
        trusted_keys, trusted_identity, require_signature, allow_unsigned: as in `verify`.
        progress: called with what is done, how much of it, and of how much (bytes).
        tell: given a sentence: who signed it.

    Returns:
        A Fetched: the folder, the bundle's digest, its size and what was transferred of it, in bytes.

    Raises:
        BundleError: the source isn't a sound bundle, doesn't answer, or isn't signed by whom it must.
        OutputError: `out` exists or can't be written.

    Example:
        >>> fetched = vera_edge.fetch("newer", out="here", have="bundle")
        >>> fetched.digest == vera_edge.verify("here").digest
        True
    """
    trust = trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned)

    def accept(folder: Path) -> None:
        check_signature(folder, trust, tell)

    return fetch_bundle(os.fspath(source), Path(out), path_or_none(have), force, progress, accept)
