"""`verify`, `validate`, `install`, `update`, `rollback` and `patch` as a person meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_bundle
from tests.conftest import Cli, CliProcess
from tests.tiny_bundle import TinyBundles
from vera_edge.bundle import contents as bundle


@pytest.fixture(scope="module")
def released(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "v1"
    limits = {"max_kl": 1e-4, "min_top1": 1.0}
    return tiny_bundle.with_golden(tiny_bundles, tiny_bundles.branch, folder, limits)


@pytest.fixture(scope="module")
def broken(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is whole and whose default adapter isn't the one its golden vectors were made with."""
    folder = shutil.copytree(released, tmp_path_factory.mktemp("broken") / "v2")
    tiny_bundle.write_adapter(folder / "adapters" / "first.onnx_adapter", tiny_bundle.vectors(9))
    tiny_bundle.rewrite(folder)
    return folder


def test_verify_says_what_a_bundle_is(released: Path, cli: Cli) -> None:
    result = cli("verify", released)
    assert result.exit_code == 0
    for word in ("sound", "decoder", "branch", "first, second", bundle.read(released).digest):
        assert word in result.stdout
    found = json.loads(cli("verify", released, "--json").stdout)
    assert found["verified"] is True and found["digest"] == bundle.read(released).digest


def test_verify_refuses_in_one_sentence(released: Path, tmp_path: Path, cli: Cli) -> None:
    folder = shutil.copytree(released, tmp_path / "b")
    (folder / "extra").write_text("x")
    result = cli("verify", folder)
    assert result.exit_code == 2 and "isn't listed" in result.stderr and result.stderr.count("\n") == 1


def test_validate_passes_and_fails_with_its_own_exit_code(released: Path, broken: Path, cli: Cli) -> None:
    result = cli("validate", released)
    assert result.exit_code == 0, result.stderr
    assert "FAIL" not in result.stdout and "determinism" in result.stdout and "onnxruntime" in result.stdout
    result = cli("validate", broken, "--json")
    assert result.exit_code == 3 and "fails on this device: drift (first)" in result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] is False and found["device"]["threads"] >= 1
    assert cli("validate", broken, "--max-kl", 100, "--min-top1", 0).exit_code == 0
    result = cli("validate", released, "--max-memory", "1MB")
    assert result.exit_code == 3 and "memory" in result.stderr
    assert cli("validate", released, "--max-memory", "much").exit_code == 2


def test_validation_runs_under_a_hard_memory_limit(released: Path) -> None:
    """With a gigabyte of address space, most of which is shared libraries and thread stacks."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from vera_edge.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["validate", str(released), "--max-memory", "200MB"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("spare", [100, 300, 100_000])
def test_too_little_memory_is_said_in_one_sentence(released: Path, spare: int) -> None:
    """`spare`: kilobytes that the process may still map once everything is imported."""
    code = (
        "import re, resource, sys\n"
        "from pathlib import Path\n"
        "import vera_edge.cli.run, vera_edge.device.runtime.session\n"
        "held = int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "limit = (held + int(sys.argv[1])) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "vera_edge.cli.main(sys.argv[2:])\n"
    )
    words = [str(spare), "run", str(released), "Hi", "--max-tokens", "2"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if spare == 100_000:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert "memory" in result.stderr


def test_install_validates_before_it_switches(released: Path, broken: Path, tmp_path: Path, cli: Cli) -> None:
    dst = tmp_path / "device"
    result = cli("install", released, dst, "--validate")
    assert result.exit_code == 0 and "runs now" in result.stdout
    result = cli("install", broken, dst, "--validate")
    assert result.exit_code == 3 and "the old stays" in result.stderr
    assert bundle.read(dst / "current").digest == bundle.read(released).digest
    assert cli("install", released, dst).stdout.split()[1:3] == ["ran", "already;"]
    assert cli("run", dst / "current", "Hi", "--max-tokens", 1).exit_code == 0


def test_a_patch_updates_and_rollback_returns(released: Path, broken: Path, tmp_path: Path, cli: Cli) -> None:
    dst, patch = tmp_path / "device", tmp_path / "patch"
    assert cli("install", released, dst).exit_code == 0
    result = cli("patch", released, broken, "-o", patch)
    assert result.exit_code == 0 and "KB" in result.stdout
    told = json.loads(cli("patch", released, broken, "-o", patch, "--force", "--json").stdout)
    assert told["folder"] == str(patch) and 0 < told["size"] < 20_000
    assert sum(path.stat().st_size for path in patch.rglob("*") if path.is_file()) < 20_000
    found = json.loads(cli("update", patch, dst, "--json").stdout)
    assert found["changed"] and found["copied"] < 5000 and found["digest"] == bundle.read(broken).digest
    found = json.loads(cli("rollback", dst, "--json").stdout)
    assert found["digest"] == bundle.read(released).digest
    result = cli("rollback", dst)
    assert result.exit_code == 2 and "nothing to roll back to" in result.stderr


def test_install_needs_no_more_than_the_standard_library(released: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vera_edge.device.deploy.install import install\n"
        "install(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert not {'numpy', 'onnxruntime', 'torch', 'click'} & set(sys.modules)\n"
    )
    words = [sys.executable, "-c", code, str(released), str(tmp_path / "device")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path, cli_process: CliProcess) -> None:
    for words in (["verify", tmp_path], ["validate", tmp_path], ["install", tmp_path, tmp_path / "d"]):
        result = cli_process(*words)
        assert result.returncode == 2 and "vera_edge.json is missing" in result.stderr
