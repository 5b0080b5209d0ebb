"""Installing, updating and rolling back: each whole or not at all, killed at whatever write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vera_edge.bundle import contents as bundle
from vera_edge.device.deploy.install import install, make_patch, rollback
from vera_edge.device.deploy.versions import current, locked
from vera_edge.errors import BundleError, DriftExceeded, OutputError

HASH = "0" * 64


def make(folder: Path, adapter: bytes, weights: bytes = b"w" * 5000) -> Path:
    """A bundle that is small and has all kinds of files."""
    for name, data in {
        "config.json": b"{}",
        "onnx/model.onnx": b"graph",
        "onnx/model.onnx_data": weights,
        "adapters/a.onnx_adapter": adapter,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    adapters = {"a": {"file": "adapters/a.onnx_adapter", "digest": HASH}}
    bundle.write(
        folder,
        bundle.ManifestFields(
            kind="decoder", mode="branch", weights="int4", base={"digest": HASH}, adapters=adapters
        ),
    )
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make(tmp_path / "old", b"old adapter")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return make(tmp_path / "new", b"new adapter")


def content(dst: Path) -> bytes:
    return (dst / "current" / "adapters" / "a.onnx_adapter").read_bytes()


def test_install_switch_and_roll_back(tmp_path: Path, old: Path, new: Path) -> None:
    dst = tmp_path / "device"
    assert current(dst) is None
    first = install(old, dst)
    assert first.changed and first.previous is None and content(dst) == b"old adapter"
    again = install(old, dst)
    assert not again.changed and again.folder == first.folder
    second = install(new, dst)
    assert content(dst) == b"new adapter" and second.previous == first.folder
    assert bundle.verify(dst / "current").digest == second.digest == bundle.read(new).digest
    back = rollback(dst)
    assert content(dst) == b"old adapter" and back.folder == first.folder and back.previous is None
    with pytest.raises(BundleError, match="nothing to roll back to"):
        rollback(dst)
    assert content(dst) == b"old adapter"


def test_a_place_that_cannot_be_one_is_left_alone(tmp_path: Path, old: Path, new: Path) -> None:
    before = sorted(old.rglob("*"))
    for inside in (old, old / "device"):
        with pytest.raises(OutputError, match="choose another place"):
            install(old, inside)
    with pytest.raises(OutputError, match="would delete"):
        make_patch(old, new, old, force=True)
    make_patch(old, new, tmp_path / "patch")
    with pytest.raises(BundleError, match="nothing is installed"):
        rollback(tmp_path / "none")
    with pytest.raises(BundleError, match="install the whole bundle"):
        install(tmp_path / "patch", tmp_path / "none", partial=True)
    assert sorted(old.rglob("*")) == before and not (tmp_path / "none").exists()


def test_only_the_last_good_version_is_kept(tmp_path: Path, old: Path, new: Path) -> None:
    dst, third = tmp_path / "device", make(tmp_path / "third", b"third")
    for source in (old, new, third):
        install(source, dst)
    assert len(list((dst / "versions").iterdir())) == 2
    rollback(dst)
    assert content(dst) == b"new adapter"
    install(old, dst)  # the version that was rolled back isn't a way back any more
    rollback(dst)
    assert content(dst) == b"new adapter"


def test_a_damaged_source_changes_nothing(tmp_path: Path, old: Path, new: Path) -> None:
    dst = tmp_path / "device"
    install(old, dst)
    path = new / "onnx" / "model.onnx_data"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(BundleError, match="is damaged"):
        install(new, dst)
    assert content(dst) == b"old adapter" and len(list((dst / "versions").iterdir())) == 1


def test_a_damaged_previous_version_is_no_way_back(tmp_path: Path, old: Path, new: Path) -> None:
    dst = tmp_path / "device"
    first = install(old, dst)
    install(new, dst)
    (first.folder / "config.json").write_bytes(b"[]")
    with pytest.raises(BundleError, match="is damaged"):
        rollback(dst)
    assert content(dst) == b"new adapter"


def test_a_damaged_current_version_is_mended_by_an_install(tmp_path: Path, old: Path) -> None:
    dst = tmp_path / "device"
    first = install(old, dst)
    (first.folder / "config.json").write_bytes(b"[]")
    mended = install(old, dst)
    assert mended.changed and bundle.verify(dst / "current").digest == mended.digest
    (dst / "current").unlink()
    (dst / "current").symlink_to("versions/../../elsewhere")
    with pytest.raises(BundleError, match="doesn't lead to a version"):
        current(dst)
    assert install(old, dst).changed and content(dst) == b"old adapter"


def test_what_is_not_accepted_never_becomes_current(tmp_path: Path, old: Path, new: Path) -> None:
    dst = tmp_path / "device"
    install(old, dst)

    def refuse(folder: Path) -> None:
        assert bundle.verify(folder).digest == bundle.read(new).digest
        raise DriftExceeded("too far")

    with pytest.raises(DriftExceeded):
        install(new, dst, accept=refuse)
    assert content(dst) == b"old adapter" and len(list((dst / "versions").iterdir())) == 1


def test_a_patch_carries_only_what_changed(tmp_path: Path, old: Path, new: Path) -> None:
    dst, patch = tmp_path / "device", tmp_path / "patch"
    assert make_patch(old, new, patch) == len(b"new adapter")
    names = {path.relative_to(patch).as_posix() for path in patch.rglob("*") if path.is_file()}
    assert names == {"vera_edge.json", "adapters/a.onnx_adapter"}
    with pytest.raises(BundleError, match="install the whole bundle"):
        install(patch, dst, partial=True)
    install(old, dst)
    with pytest.raises(BundleError, match="is missing"):
        install(patch, dst)
    updated = install(patch, dst, partial=True)
    assert updated.copied == len(b"new adapter") and content(dst) == b"new adapter"
    assert bundle.verify(dst / "current").digest == bundle.read(new).digest
    # The weights are one file under two names, so the update takes kilobytes on the disk too.
    weights = [path / "onnx" / "model.onnx_data" for path in (dst / "versions").iterdir()]
    assert weights[0].samefile(weights[1])
    rollback(dst)
    assert content(dst) == b"old adapter"


def test_a_signature_comes_along(tmp_path: Path, old: Path, new: Path) -> None:
    dst, patch = tmp_path / "device", tmp_path / "patch"
    (old / bundle.SIGNATURE).write_bytes(b"signed old")
    (new / bundle.SIGNATURE).write_bytes(b"signed new")
    install(old, dst)
    assert (dst / "current" / bundle.SIGNATURE).read_bytes() == b"signed old"
    make_patch(old, new, patch)
    install(patch, dst, partial=True)
    assert (dst / "current" / bundle.SIGNATURE).read_bytes() == b"signed new"


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    with pytest.raises(OutputError, match="make room"):
        install(old, tmp_path / "device")
    assert current(tmp_path / "device") is None


def test_two_installs_do_not_overlap(tmp_path: Path, old: Path) -> None:
    dst = tmp_path / "device"
    with (
        locked(dst),
        pytest.raises(OutputError, match="another install"),
    ):
        install(old, dst)
    assert install(old, dst).changed


def test_without_links_a_file_names_the_current_version(
    tmp_path: Path, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no right to make links")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(os, "link", refuse)
    dst = tmp_path / "device"
    install(old, dst)
    install(new, dst)
    assert (dst / "current").is_file()
    found = current(dst)
    assert found is not None and (found / "adapters" / "a.onnx_adapter").read_bytes() == b"new adapter"
    rollback(dst)
    assert current(dst) != found


# Runs in a process without torch, so that a fork at every write is quick. In the child, the n-th thing that
# changes the disk (or the n-th chunk of a copy) is where the power goes.
KILLER = """
import json, os, shutil, sys
from pathlib import Path
from vera_edge.bundle import contents as bundle
from vera_edge.device.deploy import install as installing
from vera_edge.device.deploy.versions import current

what, old, new, patch, root = sys.argv[1], *map(Path, sys.argv[2:])
installing._CHUNK = 1000
CHANGES = {f"os.{name}" for name in "rename remove mkdir rmdir symlink link truncate chmod".split()}
WRITE = os.O_WRONLY | os.O_RDWR
digests = {bundle.read(old).digest, bundle.read(new).digest}

def act(dst, progress):
    if what == "install":
        installing.install(new, dst, progress=progress)
    elif what == "update":
        installing.install(patch, dst, partial=True, progress=progress)
    else:
        installing.rollback(dst, progress=progress)

before = root / "before"
installing.install(old, before)
if what == "rollback":
    installing.install(new, before)
seen, killed = set(), 0
while True:
    dst = root / "device"
    shutil.rmtree(dst, ignore_errors=True)
    shutil.copytree(before, dst, symlinks=True)
    child = os.fork()
    if not child:
        left = killed
        def count(*_):
            global left
            if left == 0:
                os._exit(9)
            left -= 1
        def hook(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE
            if event in CHANGES or writes:
                count()
        sys.addaudithook(hook)
        act(dst, count)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    found = bundle.verify(current(dst))
    assert found.digest in digests
    seen.add(found.digest)
    if status == 0:
        break
    killed += 1
    act(dst, lambda *_: None) if what != "rollback" or found.digest == bundle.read(new).digest else None
    wanted = bundle.read(old if what == "rollback" else new).digest
    assert bundle.verify(current(dst)).digest == wanted
    if what != "rollback":
        assert not [path for path in dst.rglob("*") if ".partial-" in path.name], "left behind"
        assert installing.rollback(dst).digest == bundle.read(old).digest
print(json.dumps({"killed": killed, "seen": len(seen)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child at each of its writes")
@pytest.mark.parametrize("what", ["install", "update", "rollback"])
def test_a_kill_at_any_write_leaves_the_old_version_or_the_new(
    tmp_path: Path, old: Path, new: Path, what: str
) -> None:
    patch, root = tmp_path / "patch", tmp_path / "root"
    make_patch(old, new, patch)
    words = [sys.executable, "-c", KILLER, what, *map(str, (old, new, patch, root))]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["seen"] == 2
    assert found["killed"] > (4 if what == "rollback" else 20)
