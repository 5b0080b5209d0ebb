"""Signatures on bundles: sigstore's `model-signing`, kept in `model.sig` inside the folder it signs.

The signature covers the name and SHA-256 of every other file, the manifest included. Keys (EC P-256, P-384,
P-521) and certificates, in PEM, work offline; a folder of those that are trusted is the policy. Keyless
signatures, by the identity that a CI system vouches for, need the network on both sides. The `release` extra
brings the library, which is imported only here and only when a signature is made or checked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import SIGNATURE
from vera_edge.errors import BundleError, VeraEdgeError
from vera_edge.storage.files import sha256_file, write_atomic

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True)
class Signer:
    """What bundles are signed with. key: an EC private key (PEM), None for the identity of this CI job.

    certificate: the key's certificate (PEM), for those who trust its issuer rather than the key. chain: the
    certificates between the two.
    """

    key: Path | None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Trust:
    """Which signatures are accepted.

    keys: a public key or an issuer's certificate (PEM), or a folder of them, all trusted. identity: who may
    have signed without a key, and the OpenID Connect issuer (a URL) that vouched for them.
    """

    keys: Path | None = None
    required: bool = False
    identity: tuple[str, str] | None = None


@dataclass(frozen=True)
class Signature:
    """A signature that was checked: who made it, in words, and the SHA-256 of the trusted file, if any."""

    by: str
    key_sha256: str | None = None


def sign(folder: Path, signer: Signer) -> Path:
    """Sign every file of `folder`; returns the signature's path.

    An older signature is replaced once there is a new one. Raises BundleError when the key can't be used,
    there is no identity to sign by, or a file can't be read.
    """
    from model_signing import hashing

    folder = folder.resolve()  # the library takes no link, and `current` of what is installed is one
    path = folder / SIGNATURE
    config = _configured(signer)
    left_out = [path, *(folder / name for name in _generated(folder))]
    ignored = hashing.Config().set_ignored_paths(paths=left_out, ignore_git_paths=False)
    config.set_hashing_config(ignored)
    with tempfile.TemporaryDirectory() as elsewhere:
        fresh = Path(elsewhere) / SIGNATURE
        try:
            config.sign(folder, fresh)
            write_atomic(path, fresh.read_bytes())
        except VeraEdgeError:
            raise
        except Exception as cause:  # of the library, of the network, of the services, of what they answer
            who = "this identity" if signer.key is None else signer.key
            raise BundleError(f"{folder} can't be signed by {who}: {_one_line(cause)}") from None
    return path


def check_signer(signer: Signer, trust: Trust) -> None:
    """Before the work that is to be signed: raise BundleError when it can't be, or can't be checked."""
    if signer.key is None:
        _ambient_token()
    else:
        _configured(signer)
    if trust.keys is not None:
        _trusted_files(trust.keys)


def _configured(signer: Signer) -> Any:
    from model_signing import signing

    config = signing.Config()
    try:
        if signer.key is None:
            return config.use_sigstore_signer(identity_token=_ambient_token())
        if signer.certificate is None:
            return config.use_elliptic_key_signer(private_key=signer.key)
        return config.use_certificate_signer(
            private_key=signer.key,
            signing_certificate=signer.certificate,
            # The library doesn't take an empty chain; the certificate itself adds nothing to it.
            certificate_chain=signer.chain or (signer.certificate,),
        )
    except BundleError:
        raise
    except (OSError, ValueError, TypeError) as cause:
        raise BundleError(f"the signing key {signer.key} can't be used: {_one_line(cause)}") from None
    except Exception as cause:  # sigstore's own errors, which share no base with anything
        if signer.key is not None:  # of another kind: an RSA key has no curve to look at
            raise BundleError(f"the signing key {signer.key} isn't an elliptic-curve key; make one") from None
        raise BundleError(f"keyless signing needs the network: {_one_line(cause)}") from None


def _ambient_token() -> str:
    """The token by which a CI system says who runs here."""
    from sigstore.oidc import detect_credential

    try:
        token = detect_credential()
    except Exception as cause:  # the CI is there and refuses
        raise BundleError(f"this CI job may not ask for its identity: {_one_line(cause)}") from None
    if token is None:
        raise BundleError(
            "nothing here says who signs; keyless signing works in a CI job with an identity "
            "(GitHub: permissions id-token: write), elsewhere give a key"
        )
    return str(token)


def check(folder: Path, trust: Trust) -> Signature | None:
    """Check the signature of `folder` against the trusted keys; None when there is none and none is required.

    Raises BundleError when it is missing and required, when no trusted key made it, or when a file isn't what
    was signed.
    """
    path = folder / SIGNATURE
    bundle.check_folder(folder)  # before it is said to have no signature
    if trust.keys is not None:
        _trusted_files(trust.keys)  # a mistyped path is told, signature or not
    if not path.is_file():
        if trust.required:
            raise BundleError(f"{folder} isn't signed, and a signature is required; sign it or take another")
        return None
    if trust.keys is None and trust.identity is None:
        if trust.required:
            raise BundleError("a signature is required but no trusted key was given; pass --trusted-keys")
        return None
    faults = []
    for found, verifier in _verifiers(trust):
        fault = _fault(folder.resolve(), folder.resolve() / SIGNATURE, verifier)
        if fault is None:
            return found
        faults.append(fault)
    changed = next((fault for fault in faults if fault.startswith("Signature mismatch")), None)
    if changed:
        raise BundleError(f"{folder} isn't what was signed ({changed[:200]}); copy or download it again")
    if trust.keys is None:
        raise BundleError(f"{path} can't be held to {' of '.join(trust.identity or ())}: {faults[0][:200]}")
    raise BundleError(
        f"{path} was made by none of the {len(faults)} trusted keys in {trust.keys}; don't use it"
    )


def _verifiers(trust: Trust) -> Iterator[tuple[Signature, Any]]:
    """For each that is trusted: the signature that it would be, and a call that configures a verification."""
    for path in _trusted_files(trust.keys) if trust.keys is not None else ():
        found = Signature(path.name, sha256_file(path))
        if _CERTIFICATE in path.read_bytes():
            yield found, lambda config, path=path: config.use_certificate_verifier(certificate_chain=[path])
        else:
            yield found, lambda config, path=path: config.use_elliptic_key_verifier(public_key=path)
    if trust.identity is not None:
        who, issuer = trust.identity
        yield (
            Signature(f"{who} of {issuer}"),
            lambda config: config.use_sigstore_verifier(identity=who, oidc_issuer=issuer),
        )


def _fault(folder: Path, signature: Path, verifier: Any) -> str | None:
    """Why `verifier` doesn't vouch for `folder`, or None when it does."""
    from model_signing import verifying

    try:
        config: Any = verifier(verifying.Config())
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


def _trusted_files(keys: Path) -> list[Path]:
    found = sorted(keys.glob("*.pem")) + sorted(keys.glob("*.pub")) if keys.is_dir() else [keys]
    if not found or not all(key.is_file() for key in found):
        raise BundleError(f"{keys} holds no trusted public key (*.pem); put the publisher's key there")
    return found


def _one_line(cause: BaseException) -> str:
    return " ".join(str(cause).split())
