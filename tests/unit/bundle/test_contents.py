"""The manifest: what `write` writes `verify` accepts, and one changed byte, name or type is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vera_edge
from vera_edge.bundle import contents as bundle
from vera_edge.errors import BundleError
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json

HASH = "0" * 64
PROJECTION = {
    "digest": HASH,
    "seed": 0,
    "rank": 4,
    "in_max": 8,
    "out_max": 16,
    "rounding": "float32",
    "fused": True,
}
STEP = {
    "module": "m",
    "action": "branch",
    "source": "nf4",
    "result": "nf4",
    "shape": [16, 8],
    "options": {},
}


def make(folder: Path) -> bundle.Manifest:
    """A folder with a few small files, and its manifest."""
    for name, data in {
        "config.json": b'{"model_type": "llama"}',
        "onnx/model.onnx": bytes(range(256)),
        "onnx/model.onnx_data": os.urandom(300),
        "adapters/demo.onnx_adapter": b"adapter",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    facts = bundle.ManifestFields(
        kind="decoder",
        mode="branch",
        weights="nf4",
        base={"digest": HASH, "name": "tiny"},
        adapters={"demo": {"file": "adapters/demo.onnx_adapter", "digest": HASH}},
        default_adapter="demo",
        projection=PROJECTION,
        plan={"version": 1, "steps": []},
        limits={"max_kl": 0.01},
        requires={"onnxruntime": "1.22"},
        tools={"vera-edge": vera_edge.__version__},
    )
    return bundle.write(folder, facts)


def rewrite(folder: Path, change: Any) -> None:
    """Change the manifest as an attacker would: with a digest that fits."""
    path = folder / bundle.MANIFEST
    value = json.loads(path.read_bytes())
    change(value)
    value.pop("digest")
    value["digest"] = sha256_bytes(canonical_json(value))
    path.write_bytes(canonical_json(value))


def test_what_is_written_verifies_and_reads_back(tmp_path: Path) -> None:
    written = make(tmp_path)
    verified = bundle.verify(tmp_path)
    assert verified == written == bundle.read(tmp_path) == bundle.verify(tmp_path, deep=False)
    assert set(verified.files) == {
        "config.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "adapters/demo.onnx_adapter",
    }
    assert verified.size == sum(path.stat().st_size for path in tmp_path.rglob("*.*") if path.is_file()) - (
        (tmp_path / bundle.MANIFEST).stat().st_size
    )
    assert verified.path("config.json") == tmp_path / "config.json"
    with pytest.raises(BundleError, match="lists no file"):
        verified.path("other.json")


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path)
    first = (tmp_path / bundle.MANIFEST).read_bytes()
    manifest = bundle.read(tmp_path)
    facts = {key.name: getattr(manifest, key.name) for key in dataclasses.fields(bundle.ManifestFields)}
    bundle.write(tmp_path, bundle.ManifestFields(**facts))
    assert (tmp_path / bundle.MANIFEST).read_bytes() == first


def test_to_dict_is_the_manifest_without_its_digest(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    value = json.loads((tmp_path / bundle.MANIFEST).read_bytes())
    assert value.pop("digest") == manifest.digest
    assert manifest.to_dict() == value


def test_a_thousand_flipped_bits_are_all_caught(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    draw = random.Random(7)
    names = [*manifest.files, bundle.MANIFEST]
    for round_ in range(1000):
        path = tmp_path / names[round_ % len(names)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        for deep in (True, False):
            with pytest.raises(BundleError):
                bundle.verify(tmp_path, deep=deep)
        path.write_bytes(sound)
    bundle.verify(tmp_path)


def test_files_that_are_missing_cut_or_extra_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    extra = tmp_path / "onnx" / "surprise.py"
    extra.write_text("print()")
    with pytest.raises(BundleError, match=r"surprise\.py isn't listed"):
        bundle.verify(tmp_path, deep=False)
    extra.unlink()
    data = tmp_path / "onnx" / "model.onnx_data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx_data holds 299 bytes and the manifest says 300"):
        bundle.verify(tmp_path, deep=False)
    data.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx_data is missing"):
        bundle.verify(tmp_path, deep=False)


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    data = tmp_path / "onnx" / "model.onnx_data"
    moved = tmp_path.parent / "elsewhere"
    data.rename(moved)
    data.symlink_to(moved)
    with pytest.raises(BundleError, match=r"leads out of|is a link"):
        bundle.verify(tmp_path)
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(BundleError, match="is a link or a device"):
        bundle.verify(tmp_path)


def test_a_missing_folder_or_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="isn't a folder"):
        bundle.read(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"vera_edge\.json is missing"):
        bundle.read(tmp_path)
    (tmp_path / "current").mkdir()
    with pytest.raises(BundleError, match=r"where bundles are installed; give .*/current"):
        bundle.read(tmp_path)
    (tmp_path / bundle.MANIFEST).mkdir()
    with pytest.raises(BundleError, match="isn't a plain file"):
        bundle.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[1]",
        b"{",
        b'{"format": 1}',
        b'{"format": true}',
        b'{"format": 1.0}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / bundle.MANIFEST).write_bytes(text)
    with pytest.raises(BundleError):
        bundle.read(tmp_path)


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, lambda value: value.update(format=2, anything="new"))
    with pytest.raises(BundleError, match="has bundle format 2, newer than 1; update vera-edge"):
        bundle.read(tmp_path)


def test_unknown_keys_are_ignored_and_white_space_is_not(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, lambda value: value.update(new_fact={"a": 1}))
    bundle.verify(tmp_path)
    path = tmp_path / bundle.MANIFEST
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="was changed after it was written"):
        bundle.read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/etc/passwd",
        "a/../../b",
        "a\\b",
        "c:x",
        "a\0b",
        "",
        "a//b",
        "vera_edge.json",
        "VERA_EDGE.json",
    ],
)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    rewrite(tmp_path, lambda value: value["files"].update({name: {"size": 1, "sha256": HASH}}))
    with pytest.raises(BundleError):
        bundle.read(tmp_path)


def test_names_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, lambda value: value["files"].update({"Config.JSON": {"size": 1, "sha256": HASH}}))
    with pytest.raises(BundleError, match="listed twice"):
        bundle.read(tmp_path)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = sorted(
    {key.name for key in dataclasses.fields(bundle.ManifestFields)} | {"files", "format", "digest"}
)


@settings(deadline=None)  # it writes files, on a machine that may be busy
@given(key=st.sampled_from(_FIELDS), value=junk)
def test_junk_in_a_field_is_a_bundle_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    make(folder)
    try:
        rewrite(folder, lambda manifest: manifest.update({key: value}))
    except ValueError:  # lone surrogates aren't UTF-8: such a manifest can't exist
        return
    try:
        manifest = bundle.read(folder)
    except BundleError as error:
        assert "\n" not in str(error)
        return
    if key not in ("digest", "files"):  # rewrite gives the digest anew
        assert manifest.to_dict()[key] == value


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_version", 0, "model_version isn't an integer from 1"),
        ("model_version", 1 << 31, "model_version isn't an integer from 1"),
        ("kind", "image", "kind isn't one of decoder, encoder"),
        ("base", {}, "base isn't an object with a digest"),
        ("model", "onnx/other.onnx", "model names no listed file"),
        ("golden", "golden.json", "golden names no listed file"),
        ("limits", {"max_kl": "low"}, "limits isn't an object of numbers"),
        ("limits", {"max_kl": True}, "limits isn't an object of numbers"),
        ("requires", {"onnxruntime": "new"}, "requires isn't an object of version numbers"),
        ("cpu", ["avx9"], "cpu isn't a list of what vera-edge knows (vnni)"),
        ("cpu", "vnni", "cpu isn't a list of what vera-edge knows (vnni)"),
        ("default_adapter", "other", "default_adapter 'other' isn't an adapter"),
        ("adapters", {"../x": {"digest": HASH, "file": "config.json"}}, "adapters: a name is '../x'"),
        ("adapters", {"demo": {"digest": HASH}}, "of a branch bundle has no file"),
        ("adapters", {"demo": {"digest": HASH, "file": "x"}}, "names no listed file"),
        ("files", {"config.json": {"size": True, "sha256": HASH}}, "has no size and sha256"),
        ("files", {"config.json": {"size": -1, "sha256": HASH}}, "has no size and sha256"),
        ("files", {"config.json": {"size": 1, "sha256": "F" * 64}}, "has no size and sha256"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, key: str, value: Any, says: str) -> None:
    make(tmp_path)
    rewrite(tmp_path, lambda manifest: manifest.update({key: value}))
    with pytest.raises(BundleError, match=re.escape(says)):
        bundle.read(tmp_path)


def test_only_what_came_later_may_be_missing(tmp_path: Path) -> None:
    sound = (make(tmp_path).folder / bundle.MANIFEST).read_bytes()
    for key in _FIELDS:
        if key in ("digest", "format"):
            continue
        (tmp_path / bundle.MANIFEST).write_bytes(sound)
        rewrite(tmp_path, lambda value, key=key: value.pop(key))
        if key in (
            "branches",
            "checked",
            "cpu",
            "exact",
            "generated",
            "lora_rank",
            "model_version",
            "options",
            "trained_names",
            "vectors",
        ):
            assert not getattr(bundle.verify(tmp_path), key)
        elif key == "vector_dtype":
            assert bundle.verify(tmp_path).vector_dtype == "float32"
        else:
            with pytest.raises(BundleError, match=f"{key} is(n't| missing)"):
                bundle.read(tmp_path)


def test_what_a_graph_asks_of_a_processor(tmp_path: Path) -> None:
    """As the manifest says; one that doesn't came before exports took care, and then by its plan."""
    manifest = make(tmp_path)

    def needs(**changes: Any) -> bool:
        return bundle.write(tmp_path, bundle.change(manifest, **changes)).needs_vnni

    steps = [STEP | {"options": {"activations": kind}} for kind in ("float", "dynamic")]
    assert needs(cpu=["vnni"], plan=None) and not needs(cpu=[], plan={"steps": steps})
    assert needs(cpu=None, plan={"steps": steps}) and not needs(cpu=None, plan={"steps": steps[:1]})
    for steps in ([], [STEP]):
        assert not needs(cpu=None, plan={"steps": steps})
    assert not needs(cpu=None, plan=None)


def test_write_refuses_facts_that_contradict_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    facts = bundle.ManifestFields(kind="decoder", mode="merged", weights="int8", base={"digest": HASH})
    with pytest.raises(BundleError, match="model names no listed file"):
        bundle.write(tmp_path, facts)
    assert not (tmp_path / bundle.MANIFEST).exists()


def test_the_schema_names_every_field() -> None:
    schema = json.loads((Path(bundle.__file__).with_name("bundle.schema.json")).read_bytes())
    facts = {key.name for key in dataclasses.fields(bundle.ManifestFields)}
    assert set(schema["properties"]) == facts | {"format", "digest", "files"}
    optional = {
        "branches",
        "checked",
        "cpu",
        "exact",
        "generated",
        "lora_rank",
        "model_version",
        "options",
        "trained_names",
        "vectors",
        "vector_dtype",
    }
    assert set(schema["required"]) == set(schema["properties"]) - optional
    assert schema["properties"]["format"]["const"] == bundle.FORMAT
    pattern = re.compile(schema["properties"]["files"]["propertyNames"]["pattern"])
    for name in ("a", "onnx/model.onnx", "..a", "a..b/c"):
        assert pattern.search(name), name
    for name in ("..", "../a", "a/..", "a/../b", "/a", "a//b", "a\\b", "a:b", "a/"):
        assert not pattern.search(name), name


_ADD_UNTIL = """
import os, sys
from pathlib import Path
from vera_edge.bundle import contents as bundle

setattr(bundle, sys.argv[2], lambda *given: os._exit(9))
bundle.add(bundle.read(Path(sys.argv[1])), "onnx/model.onnx", b"a new graph", golden=None)
"""


@pytest.mark.parametrize(("step", "content"), [("_write", bytes(range(256))), ("_finish", b"a new graph")])
def test_an_addition_that_is_cut_off_leaves_the_old_bundle_or_the_new(
    tmp_path: Path, step: str, content: bytes
) -> None:
    """Killed before the manifest lists the new content, and right after."""
    make(tmp_path)
    child = subprocess.run([sys.executable, "-c", _ADD_UNTIL, str(tmp_path), step], check=False)
    assert child.returncode == 9
    bundle.verify(tmp_path)
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == content
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    bundle.add(bundle.read(tmp_path), "onnx/model.onnx", b"newer still")
    bundle.verify(tmp_path)
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == b"newer still"


def test_an_addition_that_the_manifest_refuses_changes_nothing(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BundleError):
        bundle.add(manifest, "golden.json", b"{}", kind="nonsense")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
