"""The examples run: the Makefile as it is, the workflow's shell steps against the commands they call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.conftest import Cli
from vera_edge.bundle import contents as bundle
from vera_edge.device.deploy import versions
from vera_edge.releasing import recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def project(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "project"
    # Of a base and an adapter of one's own; the demo's isn't for a tiny model.
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("adapter"))
    shutil.copytree(tiny_llama.nf4, folder / "base")
    shutil.copytree(tiny_adapter, folder / "adapter")
    (folder / "eval.txt").write_text(tiny.TEXT * 8)
    return folder


def environment(project: Path) -> dict[str, str]:
    return {**os.environ, "VERA_EDGE_CACHE": str(project.parent / "cache")}


def test_the_makefile_releases_verifies_and_installs(project: Path) -> None:
    words = ["make", "install", f"VERA_EDGE={sys.executable} -m vera_edge"]
    done = subprocess.run(
        words, cwd=project, env=environment(project), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = bundle.verify(project / "out" / "docs" / "fast")
    running = versions.current(project / "device")
    assert running is not None and bundle.read(running).digest == made.digest


def test_the_recipe_names_what_its_comments_say() -> None:
    found = recipe.read(EXAMPLES / "release.toml")
    assert [variant.name for _, variant in found.jobs] == ["exact", "fast"]


def test_the_workflow_is_valid_and_its_release_step_runs(
    project: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = yaml.safe_load((EXAMPLES / "github" / "release.yml").read_text())
    steps = {step["name"]: step["run"] for step in workflow["jobs"]["release"]["steps"] if "name" in step}
    words = steps["release"].split()
    assert words[0] == "vera-edge"
    monkeypatch.chdir(project)
    done = cli(*words[1:], "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("docs/exact")
