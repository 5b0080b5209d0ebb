"""`vera_edge.verify`: is a bundle whole? `vera_edge.read_manifest`: what does it say of itself?"""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath
from vera_edge.api.int8_warning import warn_of_int8
from vera_edge.api.trust import check_signature, trust_in
from vera_edge.bundle import contents
from vera_edge.bundle.manifest import Manifest
from vera_edge.progress import Progress, Tell, silent, unheard
from vera_edge.storage.digest_notes import DigestNotes

__all__ = ["Manifest", "read_manifest", "verify"]


def verify(
    bundle: StrPath,
    *,
    fast: bool = False,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Manifest:
    """Check every file of a bundle against its manifest, offline. Each is read, whatever is remembered of it.

    Args:
        bundle: the exported folder.
        fast: don't read files over 64 MiB; their size is checked.
        trusted_keys: a public key or an issuer's certificate (PEM), or a folder of them; the bundle must
            carry a signature of one of theirs.
        trusted_identity: who must have signed where it wasn't a key, and the URL of who vouched for them.
        require_signature: refuse a bundle without a trusted signature also where no key is named.
        allow_unsigned: let a bundle without a signature pass although keys are named.
        progress: called with what is done, how much of it, and of how much (bytes).
        tell: given a sentence: who signed it.

    Returns:
        The Manifest: `files` (name: size in bytes, SHA-256), `kind`, `mode`, `weights`, `adapters`, `digest`.

    Raises:
        BundleError: a file is missing, damaged or not listed, or the signature isn't one that is trusted.

    Example:
        >>> manifest = vera_edge.verify("bundle")
        >>> manifest.kind, manifest.mode, manifest.default_adapter
        ('decoder', 'branch', 'default')
    """
    trust = trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned)
    check_signature(Path(bundle), trust, tell)
    notes = DigestNotes(reread=True)  # so that a start needn't read again what is read here
    manifest = contents.verify(Path(bundle), deep=not fast, progress=progress, notes=notes)
    warn_of_int8(manifest)
    return manifest


def read_manifest(bundle: StrPath) -> Manifest:
    """The manifest of a bundle, checked in itself; whether the files match is `verify`'s question.

    Args:
        bundle: the exported folder.

    Returns:
        The Manifest; see `verify`.

    Raises:
        BundleError: it is missing, damaged, or of a newer format.

    Example:
        >>> manifest = vera_edge.read_manifest("bundle")
        >>> list(manifest.adapters)
        ['default']
    """
    return contents.read(Path(bundle))
