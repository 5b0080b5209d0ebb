"""The device part where nothing else is installed: what it weighs, what it loads, and that it works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import foreign_code, tiny, tiny_bundle
from tests.tiny_bundle import TinyBundles
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import target

LIMIT = 200e6  # bytes
HEAVY = ("torch", "transformers", "peft", "onnx", "onnx_ir", "bitsandbytes", "onnxruntime_genai", "optimum")
# What wheels bring, by distribution, without Python's own pip and setuptools and its compiled caches.
WEIGHT = """
import json
from importlib.metadata import distributions
found = {}
for one in distributions():
    if one.metadata["Name"] not in ("pip", "setuptools"):
        paths = [one.locate_file(file) for file in one.files or () if not str(file).endswith(".pyc")]
        found[one.metadata["Name"]] = sum(path.stat().st_size for path in paths if path.is_file())
print(json.dumps(found))
"""
LOADED = """
import importlib, json, pkgutil, sys
import vera_edge.device
for found in pkgutil.walk_packages(vera_edge.device.__path__, "vera_edge.device."):
    importlib.import_module(found.name)
print(json.dumps([vera_edge.__file__, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def call(words: list[object], where: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where the checkout can't be found: neither in the folder nor on Python's path."""
    command = [str(word) for word in words]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=where, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def weights(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    found: dict[str, int] = json.loads(
        call([fresh / "python", "-c", WEIGHT], tmp_path_factory.mktemp("weights")).stdout
    )
    return found


def test_it_weighs_under_200_megabytes(weights: dict[str, int]) -> None:
    total = sum(weights.values())
    assert {"vera-edge", "numpy", "onnxruntime", "tokenizers"} <= weights.keys()
    assert 50e6 < total < LIMIT, sorted(weights.items(), key=lambda item: -item[1])


def test_every_module_of_the_device_part_imports_and_loads_nothing_heavy(fresh: Path, tmp_path: Path) -> None:
    ran = call([fresh / "python", "-c", LOADED], tmp_path)
    assert ran.returncode == 0, ran.stderr
    file, modules = json.loads(ran.stdout)
    assert Path(file).is_relative_to(fresh.parent)  # the wheel's, not the checkout's
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(modules)
    assert not set(modules) & set(HEAVY)


def test_its_command_runs_no_code_of_the_bundle_that_one_stands_in(
    fresh: Path, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    """The command as pip installed it, and the module; test_untrusted_folders has every command."""
    folder = foreign_code.plant(Path(shutil.copytree(tiny_bundles.fp32, tmp_path / "b")), tmp_path / "marks")
    tiny_bundle.rewrite(folder)
    for launch in ([fresh / "vera-edge"], [fresh / "python", "-m", "vera_edge"]):
        for words in (["verify", "."], ["bench", ".", "--rounds", "1", "--prompt", "2", "--new", "2"]):
            done = call([*launch, *words], folder)
            assert done.returncode == 0, done.stderr
    assert foreign_code.marks_in(tmp_path / "marks") == []


def test_it_verifies_and_runs_a_bundle(fresh: Path, tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    vera_edge = fresh / "vera-edge"
    shown = call([vera_edge, "verify", tiny_bundles.branch], tmp_path)
    assert shown.returncode == 0 and bundle.read(tiny_bundles.branch).digest in shown.stdout, shown.stderr
    for choice in ("first", "none"):
        words = ["run", tiny_bundles.branch, "The adapter", "--raw", "--max-tokens", 12, "--adapter", choice]
        ran = call([vera_edge, *words, "--json"], tmp_path)
        assert ran.returncode == 0, ran.stderr
        session = Session.open(tiny_bundles.branch, None if choice == "none" else choice)
        here = session.generate("The adapter", raw=True, max_tokens=12)
        text = "".join(here)
        found = json.loads(ran.stdout)
        assert (found["text"], found["tokens"]) == (text, here.tokens) and here.tokens


def test_it_says_what_it_lacks_and_with_which_line_it_comes(
    fresh: Path, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    vera_edge = fresh / "vera-edge"
    ran = call([vera_edge, "doctor", "--json"], tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["broken"] == [] and {"build", "release", "serve"} <= found["missing"].keys()
    assert "torch" in found["missing"]["build"]
    assert found["advice"]["serve"] == "pip install 'vera-edge[serve]'"
    assert call([vera_edge, "doctor"], tmp_path).returncode == 0
    refused = call([vera_edge, "serve", tiny_bundles.branch], tmp_path)
    assert refused.returncode == 2 and found["advice"]["serve"] in refused.stderr
    talked = subprocess.run(
        [str(vera_edge), "chat", str(tiny_bundles.branch), "--max-tokens", "4"],
        input="Merge the two.\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert talked.returncode == 0 and talked.stdout, talked.stderr


def test_it_draws_projections_from_the_seed(
    fresh: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    out, device = tmp_path / "out", tmp_path / "device"
    options = {"origin": "seed"}
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="int8", options=options)
    ran = call([fresh / "vera-edge", "install", out, device, "--json"], tmp_path)
    assert ran.returncode == 0, ran.stderr
    installed = bundle.verify(device / "current", complete=True)
    assert installed.generated and installed.digest == json.loads(ran.stdout)["digest"]
