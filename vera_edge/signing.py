"""Signatures on bundles: sigstore's `model-signing`, kept in `model.sig` inside the folder it signs.

The signature covers the name and SHA-256 of every other file, the manifest included. Key pairs (EC P-256,
P-384, P-521, in PEM) work offline; a folder of trusted public keys is the policy. The `release` extra brings
the library, which is imported only here and only when a signature is made or checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge import bundle
from vera_edge.bundle import SIGNATURE
from vera_edge.errors import BundleError
from vera_edge.files import sha256_file


@dataclass(frozen=True)
class Trust:
    """Which signatures are accepted. `keys`: a public key (PEM) or a folder of them, all trusted."""

    keys: Path | None = None
    required: bool = False


@dataclass(frozen=True)
class Signature:
    """A signature that was checked: the trusted key that made it and the SHA-256 of that key's file."""

    key: Path
    key_sha256: str


def sign(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Sign every file of `folder` with an EC private key (PEM); returns the signature's path.

    Raises BundleError when the key can't be used. An older signature is replaced.
    """
    from model_signing import hashing, signing

    path = (folder / SIGNATURE).absolute()
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=password)
    except (OSError, ValueError, TypeError) as cause:
        raise BundleError(f"the signing key {private_key} can't be used: {_one_line(cause)}") from None
    path.unlink(missing_ok=True)
    left_out = [path, *(folder.absolute() / name for name in _generated(folder))]
    ignored = hashing.Config().set_ignored_paths(paths=left_out, ignore_git_paths=False)
    config.set_hashing_config(ignored).sign(folder.absolute(), path)
    return path


def check(folder: Path, trust: Trust) -> Signature | None:
    """Check the signature of `folder` against the trusted keys; None when there is none and none is required.

    Raises BundleError when it is missing and required, when no trusted key made it, or when a file isn't what
    was signed.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        if trust.required:
            raise BundleError(f"{folder} isn't signed, and a signature is required; sign it or take another")
        return None
    if trust.keys is None:
        if trust.required:
            raise BundleError("a signature is required but no trusted key was given; pass --trusted-keys")
        return None
    keys = _trusted_keys(trust.keys)
    faults = []
    for key in keys:
        fault = _fault(folder.absolute(), path.absolute(), key)
        if fault is None:
            return Signature(key, sha256_file(key))
        faults.append(fault)
    changed = next((fault for fault in faults if fault.startswith("Signature mismatch")), None)
    if changed:
        raise BundleError(f"{folder} isn't what was signed ({changed[:200]}); copy or download it again")
    raise BundleError(
        f"{path} was made by none of the {len(keys)} trusted keys in {trust.keys}; don't use it"
    )


def _fault(folder: Path, signature: Path, key: Path) -> str | None:
    """Why `key` doesn't vouch for `folder`, or None when it does."""
    from model_signing import verifying

    try:
        config: Any = verifying.Config().use_elliptic_key_verifier(public_key=key)
        # A signed bundle may have its projections drawn since; `bundle.verify` holds them to the manifest.
        config.set_ignore_unsigned_files(bool(_generated(folder))).verify(folder, signature)
    except Exception as cause:  # a hostile signature file may raise anything from the parsers below
        return _one_line(cause) or type(cause).__name__
    return None


def _generated(folder: Path) -> tuple[str, ...]:
    """The files that aren't shipped and hence not signed; none where there is no sound manifest."""
    try:
        return tuple(bundle.read(folder).generated)
    except BundleError:
        return ()


def _trusted_keys(keys: Path) -> list[Path]:
    found = sorted(keys.glob("*.pem")) + sorted(keys.glob("*.pub")) if keys.is_dir() else [keys]
    if not found or not all(key.is_file() for key in found):
        raise BundleError(f"{keys} holds no trusted public key (*.pem); put the publisher's key there")
    return found


def _one_line(cause: BaseException) -> str:
    return " ".join(str(cause).split())
