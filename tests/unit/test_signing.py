"""Signatures: a trusted key passes; a changed byte, an added file, another key or none doesn't."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import Cli
from vera_edge import bundle, signing
from vera_edge.errors import BundleError
from vera_edge.files import sha256_bytes
from vera_edge.signing import Trust


def make_key(folder: Path, name: str) -> tuple[Path, Path]:
    """An EC P-256 key pair as PEM files: (private, public)."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "keys").mkdir()
    return make_key(tmp_path / "keys", "publisher")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    facts = bundle.Facts(kind="decoder", mode="merged", weights="int8", base={"digest": "0" * 64})
    bundle.write(folder, facts)
    signing.sign(folder, keys[0])
    return folder


def test_a_trusted_signature_passes_and_the_bundle_stays_sound(signed: Path, keys: tuple[Path, Path]) -> None:
    found = signing.check(signed, Trust(keys[1].parent, required=True))
    assert found is not None and found.key == keys[1]
    bundle.verify(signed)


def test_it_holds_wherever_the_folder_lies(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(signed, moved)
    assert signing.check(moved, Trust(keys[1], required=True)) is not None


def test_a_changed_byte_is_found(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "onnx" / "model.onnx").write_bytes(b"graqh")
    with pytest.raises(BundleError, match="isn't what was signed"):
        signing.check(signed, Trust(keys[1], required=True))


def test_a_rewritten_manifest_is_found(signed: Path, keys: tuple[Path, Path]) -> None:
    """What the manifest alone can't catch: somebody changes a file and writes a fitting manifest."""
    (signed / "onnx" / "model.onnx").write_bytes(b"other")
    bundle.write(signed, bundle.change(bundle.read(signed)))
    bundle.verify(signed)
    with pytest.raises(BundleError, match="isn't what was signed"):
        signing.check(signed, Trust(keys[1], required=True))


def test_an_added_file_is_found(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "extra").touch()
    with pytest.raises(BundleError, match="isn't what was signed"):
        signing.check(signed, Trust(keys[1], required=True))


def test_a_file_that_is_drawn_after_signing_keeps_the_signature(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    entry = {"size": 5, "sha256": sha256_bytes(b"drawn")}
    facts = bundle.change(
        bundle.read(signed), generated={"onnx/drawn": entry}, projection={"digest": "0" * 64}
    )
    bundle.write(signed, facts)
    signing.sign(signed, keys[0])
    (signed / "onnx" / "drawn").write_bytes(b"drawn")
    assert signing.check(signed, Trust(keys[1], required=True)) is not None
    bundle.verify(signed)
    signing.sign(signed, keys[0])
    (signed / "onnx" / "drawn").unlink()
    assert signing.check(signed, Trust(keys[1], required=True)) is not None
    (signed / "extra").touch()
    with pytest.raises(BundleError, match="extra isn't listed"):
        bundle.verify(signed)
    (signed / "onnx" / "model.onnx").write_bytes(b"graqh")
    with pytest.raises(BundleError, match="isn't what was signed"):
        signing.check(signed, Trust(keys[1], required=True))


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, stranger = make_key(tmp_path, "stranger")
    with pytest.raises(BundleError, match="none of the 1 trusted keys"):
        signing.check(signed, Trust(stranger, required=True))


def test_rubbish_for_a_signature_is_refused(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / bundle.SIGNATURE).write_bytes(b'{"mediaType": []}')
    with pytest.raises(BundleError, match="none of the 1 trusted keys"):
        signing.check(signed, Trust(keys[1], required=True))


def test_no_signature_is_refused_only_when_one_is_required(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / bundle.SIGNATURE).unlink()
    assert signing.check(signed, Trust(keys[1])) is None
    with pytest.raises(BundleError, match="isn't signed"):
        signing.check(signed, Trust(keys[1], required=True))


def test_a_key_that_is_none_leaves_the_old_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(BundleError, match="can't be used"):
        signing.sign(signed, keys[1])
    assert signing.check(signed, Trust(keys[1], required=True)) is not None


def test_no_trusted_keys_at_hand(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="pass --trusted-keys"):
        signing.check(signed, Trust(None, required=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="holds no trusted public key"):
        signing.check(signed, Trust(tmp_path / "empty"))


def test_commands_hold_a_bundle_to_its_signature(signed: Path, keys: tuple[Path, Path], cli: Cli) -> None:
    policy = ("--trusted-keys", keys[1].parent, "--require-signature")
    result = cli("verify", signed, *policy)
    assert result.exit_code == 0 and "signed by publisher.pem" in result.stderr
    (signed / bundle.SIGNATURE).unlink()
    for command in (("verify", signed), ("validate", signed), ("install", signed, signed.parent / "device")):
        result = cli(*command, *policy)
        assert result.exit_code == 2 and "isn't signed" in result.stderr
    assert not (signed.parent / "device").exists()
