"""Signatures: a trusted key passes; a changed byte, an added file, another key or none doesn't."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.conftest import Cli
from vera_edge.bundle import contents as bundle
from vera_edge.bundle import signing
from vera_edge.bundle.signing import Signer, Trust
from vera_edge.device.deploy.install import install
from vera_edge.errors import BundleError
from vera_edge.storage.files import sha256_bytes


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


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_certificates(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A key, its certificate, which has long expired, and the certificate of that one's issuer."""
    private, _ = make_key(folder, name)
    issuer = ec.generate_private_key(ec.SECP256R1())
    own: Any = serialization.load_pem_private_key(private.read_bytes(), None)
    made = []
    for who, key, authority in ((f"{name} root", issuer, True), (name, own, False)):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{name} root")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2020, 1, 1))
            .not_valid_after(datetime.datetime(2021, 1, 1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(_usage(authority), critical=True)
            .sign(issuer, hashes.SHA256())
        )
        path = folder / f"{who.replace(' ', '-')}.crt.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        made.append(path)
    return private, made[1], made[0]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "keys").mkdir()
    return make_key(tmp_path / "keys", "publisher")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    facts = bundle.ManifestFields(kind="decoder", mode="merged", weights="int8", base={"digest": "0" * 64})
    bundle.write(folder, facts)
    signing.sign(folder, Signer(keys[0]))
    return folder


def test_a_trusted_signature_passes_and_the_bundle_stays_sound(signed: Path, keys: tuple[Path, Path]) -> None:
    found = signing.check(signed, Trust(keys[1].parent, required=True))
    assert found is not None and found.by == keys[1].name
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
    tensors = {"a": {"matrix": "B", "start": 0, "stop": 1, "offset": 0}}
    entry = {"size": 5, "sha256": sha256_bytes(b"drawn"), "dtype": "float32", "tensors": tensors}
    spec = {"digest": "0" * 64, "seed": 0, "rank": 1, "in_max": 1, "out_max": 1}
    facts = bundle.change(
        bundle.read(signed),
        generated={"onnx/drawn": entry},
        projection=spec | {"rounding": "float32", "fused": True},
    )
    bundle.write(signed, facts)
    signing.sign(signed, Signer(keys[0]))
    (signed / "onnx" / "drawn").write_bytes(b"drawn")
    assert signing.check(signed, Trust(keys[1], required=True)) is not None
    bundle.verify(signed)
    signing.sign(signed, Signer(keys[0]))
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
    with pytest.raises(BundleError, match="none isn't a folder"):
        signing.check(signed.parent / "none", Trust(keys[1], required=True))


def test_a_certificate_is_trusted_by_its_issuer(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """The issuer is one of a folder of trusted files, keys and certificates; no clock has a say."""
    key, certificate, root = make_certificates(tmp_path, "team")
    signing.sign(signed, Signer(key, certificate))
    with pytest.raises(BundleError, match="none of the 1 trusted keys"):
        signing.check(signed, Trust(keys[1].parent, required=True))
    shutil.copy(root, keys[1].parent)
    found = signing.check(signed, Trust(keys[1].parent, required=True))
    assert found is not None and found.by == root.name
    _, _, stranger = make_certificates(tmp_path, "stranger")
    with pytest.raises(BundleError, match="none of the 1 trusted keys"):
        signing.check(signed, Trust(stranger, required=True))
    (signed / "onnx" / "model.onnx").write_bytes(b"graqh")
    with pytest.raises(BundleError, match="isn't what was signed"):
        signing.check(signed, Trust(root, required=True))


def test_a_certificate_of_another_key_is_refused(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    _, certificate, _ = make_certificates(tmp_path, "team")
    with pytest.raises(BundleError, match="can't be used"):
        signing.sign(signed, Signer(keys[0], certificate))


def test_keyless_signing_needs_somebody_who_says_who_signs(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "GITHUB_ACTIONS", "BUILDKITE", "GITLAB_CI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BundleError, match="nothing here says who signs"):
        signing.sign(signed, Signer(None))
    assert signing.check(signed, Trust(keys[1], required=True)) is not None


def test_a_signature_by_key_is_none_of_an_identity(signed: Path) -> None:
    identity = ("release@example.com", "https://issuer.example.com")
    with pytest.raises(BundleError, match=r"can't be held to release@example.com of https://issuer"):
        signing.check(signed, Trust(required=True, identity=identity))


def test_the_command_signs(signed: Path, keys: tuple[Path, Path], cli: Cli) -> None:
    (signed / bundle.SIGNATURE).unlink()
    assert cli("sign", signed, "--key", keys[0]).exit_code == 0
    assert signing.check(signed, Trust(keys[1], required=True)) is not None
    (signed / "onnx" / "model.onnx").write_bytes(b"graqh")
    result = cli("sign", signed, "--key", keys[0])
    assert result.exit_code == 2 and "is damaged" in result.stderr
    assert "give --key" in cli("sign", signed).stderr


def test_a_key_that_is_none_leaves_the_old_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(BundleError, match="can't be used"):
        signing.sign(signed, Signer(keys[1]))
    other = rsa.generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    (signed.parent / "rsa.pem").write_bytes(other)
    with pytest.raises(BundleError, match="isn't an elliptic-curve key"):
        signing.sign(signed, Signer(signed.parent / "rsa.pem"))
    assert signing.check(signed, Trust(keys[1], required=True)) is not None


def test_no_trusted_keys_at_hand(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="pass --trusted-keys"):
        signing.check(signed, Trust(None, required=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="holds no trusted public key"):
        signing.check(signed, Trust(tmp_path / "empty"))
    (signed / bundle.SIGNATURE).unlink()
    with pytest.raises(BundleError, match="holds no trusted public key"):
        signing.check(signed, Trust(tmp_path / "mistyped.pem"))


def test_commands_hold_a_bundle_to_its_signature(signed: Path, keys: tuple[Path, Path], cli: Cli) -> None:
    policy = ("--trusted-keys", keys[1].parent, "--require-signature")
    result = cli("verify", signed, *policy)
    assert result.exit_code == 0 and "signed by publisher.pem" in result.stderr
    (signed / bundle.SIGNATURE).unlink()
    for command in (("verify", signed), ("validate", signed), ("install", signed, signed.parent / "device")):
        result = cli(*command, *policy)
        assert result.exit_code == 2 and "isn't signed" in result.stderr
    assert not (signed.parent / "device").exists()
    told = cli("verify", signed, "--trusted-keys", keys[1], "--allow-unsigned")
    assert told.exit_code == 0 and "isn't signed" in told.stderr


def test_an_update_is_held_to_the_signature_of_what_it_makes(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    new, dst, patch = Path(shutil.copytree(signed, tmp_path / "new")), tmp_path / "device", tmp_path / "patch"
    (new / bundle.SIGNATURE).unlink()
    (new / "adapters").mkdir()
    (new / "adapters" / "a.onnx_adapter").write_bytes(b"vectors")
    bundle.write(new, bundle.change(bundle.read(new)))
    assert cli("install", signed, dst).exit_code == 0
    stranger = make_key(tmp_path, "stranger")
    policy = ("--trusted-keys", keys[1], "--require-signature")
    for key, words in ((None, "isn't signed"), (stranger[0], "by none of the 1 trusted keys")):
        if key is not None:
            signing.sign(new, Signer(key))
        assert cli("patch", signed, new, "-o", patch, "--force").exit_code == 0
        refused = cli("update", patch, dst, *policy)
        assert refused.exit_code == 2 and words in refused.stderr
        assert bundle.read(dst / "current").digest == bundle.read(signed).digest
    signing.sign(new, Signer(keys[0]))
    assert cli("patch", signed, new, "-o", patch, "--force").exit_code == 0
    taken = cli("update", patch, dst, *policy)
    assert taken.exit_code == 0 and "signed by publisher.pem" in taken.stderr
    assert bundle.read(dst / "current").digest == bundle.read(new).digest


@pytest.mark.parametrize("by_environment", [False, True])
def test_naming_keys_asks_for_a_signature(
    signed: Path, keys: tuple[Path, Path], cli: Cli, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    """Whoever strips the signature off a bundle must not get it past a device that has keys."""
    named: tuple[Any, ...] = ("--trusted-keys", keys[1])
    if by_environment:
        monkeypatch.setenv("VERA_EDGE_TRUSTED_KEYS", str(keys[1]))
        named = ()
    (signed / bundle.SIGNATURE).unlink()
    place = signed.parent / "device"
    for command in (
        ("verify", signed),
        ("validate", signed),
        ("bench", signed),
        ("install", signed, place),
        ("fetch", signed, "-o", place),
    ):
        refused = cli(*command, *named)
        assert refused.exit_code == 2 and "isn't signed" in refused.stderr, command
        assert not place.exists()
    assert cli("install", signed, place, *named, "--allow-unsigned").exit_code == 0
    both = cli("install", signed, place, *named, "--allow-unsigned", "--require-signature")
    assert both.exit_code == 2 and "contradict" in both.stderr


def test_no_key_and_no_wish_asks_for_nothing(signed: Path, cli: Cli) -> None:
    (signed / bundle.SIGNATURE).unlink()
    assert cli("verify", signed).exit_code == 0


def test_what_is_checked_is_what_is_installed(
    signed: Path, keys: tuple[Path, Path], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to the stick may swap the bundle after any look at it there."""

    def swapped(src: Path, *given: Any, **words: Any) -> Any:
        (src / "onnx" / "model.onnx").write_bytes(b"other")
        bundle.write(src, bundle.change(bundle.read(src)))
        return install(src, *given, **words)

    monkeypatch.setattr("vera_edge.api.install.install_bundle", swapped)
    refused = cli("install", signed, signed.parent / "device", "--trusted-keys", keys[1])
    assert refused.exit_code == 2 and "isn't what was signed" in refused.stderr
    assert not (signed.parent / "device").exists()


def test_a_version_from_before_the_keys_is_no_way_back(
    signed: Path, keys: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    dst, unsigned = tmp_path / "device", Path(shutil.copytree(signed, tmp_path / "unsigned"))
    (unsigned / "onnx" / "model.onnx").write_bytes(b"older")
    bundle.write(unsigned, bundle.change(bundle.read(unsigned)))
    (unsigned / bundle.SIGNATURE).unlink()
    assert cli("install", unsigned, dst).exit_code == 0
    assert cli("install", signed, dst, "--trusted-keys", keys[1]).exit_code == 0
    refused = cli("rollback", dst, "--trusted-keys", keys[1])
    assert refused.exit_code == 2 and "isn't signed" in refused.stderr
    assert bundle.read(dst / "current").digest == bundle.read(signed).digest
    assert cli("rollback", dst).exit_code == 0


def test_a_new_signature_reaches_a_version_that_runs_already(
    signed: Path, keys: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    unsigned, dst = Path(shutil.copytree(signed, tmp_path / "unsigned")), tmp_path / "device"
    (unsigned / bundle.SIGNATURE).unlink()
    assert cli("install", unsigned, dst).exit_code == 0
    policy = ("--trusted-keys", keys[1])
    assert cli("install", unsigned, dst, *policy).exit_code == 2
    stranger = Path(shutil.copytree(unsigned, tmp_path / "stranger"))
    signing.sign(stranger, Signer(make_key(tmp_path, "stranger")[0]))
    assert cli("install", stranger, dst, *policy).exit_code == 2
    assert not (dst / "current" / bundle.SIGNATURE).exists()
    assert cli("install", signed, dst, *policy).exit_code == 0
    assert cli("verify", dst / "current", *policy).exit_code == 0
    assert len(list((dst / "versions").iterdir())) == 1


def test_a_signing_that_fails_midway_leaves_the_old_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    before = (signed / bundle.SIGNATURE).read_bytes()
    (signed / "link").symlink_to(signed.parent / "nowhere")
    with pytest.raises(BundleError, match="can't be signed by"):
        signing.sign(signed, Signer(keys[0]))
    assert (signed / bundle.SIGNATURE).read_bytes() == before
