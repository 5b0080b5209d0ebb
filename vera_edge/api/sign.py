"""`vera_edge.sign`: a signature on a bundle that is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.api.arguments import StrPath, path_or_none
from vera_edge.bundle import contents, signing
from vera_edge.errors import PlanError
from vera_edge.progress import Progress, silent

__all__ = ["sign"]


def sign(
    bundle: StrPath,
    *,
    key: StrPath | None = None,
    certificate: StrPath | None = None,
    chain: Sequence[StrPath] = (),
    keyless: bool = False,
    progress: Progress = silent,
) -> Path:
    """Sign a bundle, once every byte of it is verified; an older signature is replaced.

    Args:
        bundle: the exported folder.
        key: an EC private key, PEM.
        certificate: the key's certificate, PEM.
        chain: the certificates between it and the trusted one, PEM.
        keyless: sign by the identity of this CI job instead; needs the network.
        progress: called with what is done, how much of it, and of how much (bytes).

    Returns:
        The signature's file, in the bundle.

    Raises:
        BundleError: the bundle isn't whole, the key can't be used, or there is no identity to sign by.
        PlanError: neither a key nor keyless is asked for, or both.

    Example:
        >>> signature = vera_edge.sign("bundle", key="publisher.key")
        >>> signature.name, vera_edge.verify("bundle", trusted_keys="publisher.pem").mode
        ('model.sig', 'branch')
    """
    if (key is None) != keyless:
        raise PlanError("give key or keyless, one of them")
    contents.verify(Path(bundle), progress=progress)
    signer = signing.Signer(path_or_none(key), path_or_none(certificate), tuple(Path(path) for path in chain))
    return signing.sign(Path(bundle), signer)
