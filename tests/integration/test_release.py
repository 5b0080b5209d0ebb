"""A recipe of two adapters: bundles, gates, caching, rebuilding and faults, on the tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests import tiny
from tests.conftest import Cli
from tests.unit.bundle.test_signing import make_key
from vera_edge.bundle import contents as bundle
from vera_edge.bundle import signing
from vera_edge.bundle.signing import Trust
from vera_edge.storage.json_text import canonical_json

RECIPE = """
[release]
name = "tiny"
version = "1.2.0"
[[base]]
id = "tiny"
path = "nf4"
licence = "Apache-2.0"
[[adapter]]
id = "a"
base = "tiny"
path = "a"
[[adapter]]
id = "b"
base = "tiny"
path = "b"
[[variant]]
target = "onnx"
mode = "branch"
weights = "int8"
[limits]
data = "t.txt"
max_kl = 0.05
"""
NAME = "onnx-branch-int8"


@pytest.fixture(scope="module")
def inputs(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "inputs"
    folder.mkdir()
    shutil.copytree(tiny_llama.nf4, folder / "nf4")
    tiny.make_adapter(tiny_llama.nf4, folder / "a")
    tiny.make_adapter(tiny_llama.nf4, folder / "b", vectors_seed=9)
    (folder / "t.txt").write_text(tiny.TEXT * 8)
    (folder / "r.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def released(inputs: Path, store: Path) -> Path:
    from vera_edge.releasing.run import release

    out = inputs.parent / "out"
    made = release(inputs / "r.toml", out, store=store)
    assert [result.state for result in made.results] == ["built", "built"]
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_bundles_are_whole_and_say_what_they_are(released: Path) -> None:
    for name in ("a", "b"):
        folder = released / name / NAME
        manifest = bundle.verify(folder)
        assert manifest.limits["max_kl"] == 0.05
        drift = json.loads((folder / "evidence" / "drift.json").read_bytes())
        assert drift["passed"] and drift["fidelity"]["kl"]["mean"]["value"] < 0.05
        card = (folder / "README.md").read_text()
        assert "The adapter is kept" in card and f"adapter `{name}`" in card
    index = json.loads((released / "release.json").read_bytes())
    assert [entry["state"] for entry in index["bundles"]] == ["ok", "ok"]
    assert "| a/onnx-branch-int8 | ok |" in (released / "SUMMARY.md").read_text()


def test_a_device_can_validate_what_was_released(released: Path, cli: Cli) -> None:
    result = cli("validate", released / "a" / NAME, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {row["adapter"] for row in found["drift"]} == {None, "default"}


def test_the_bill_of_materials_is_valid_cyclonedx(released: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (released / "a" / NAME / "evidence" / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    named = {part["name"] for part in json.loads(text)["components"]}
    assert {"tiny", "a", "torch", "onnxruntime"} <= named


def test_adapters_of_one_base_share_its_graph(released: Path) -> None:
    a, b = (content(released / name / NAME) for name in ("a", "b"))
    for name in ("onnx/model.onnx_data", "onnx/model.onnx", "tokenizer.json"):
        assert a[name] == b[name]
        # On the disk as well, where nobody can write into the file by mistake.
        assert (released / "a" / NAME / name).samefile(released / "b" / NAME / name)
        assert (released / "a" / NAME / name).stat().st_mode & 0o222 == 0
    assert a["adapters/default.onnx_adapter"] != b["adapters/default.onnx_adapter"]


@pytest.mark.parametrize("out", ["nf4", "nf4/inside", "a", "around"])
def test_nothing_is_published_into_an_input_or_its_place(
    inputs: Path, tmp_path: Path, cli: Cli, out: str
) -> None:
    folder = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    text = RECIPE
    if out == "around":
        shutil.move(folder / "b", folder / "around" / "a" / NAME)
        text = RECIPE.replace('path = "b"', f'path = "around/a/{NAME}"')
    (folder / "r.toml").write_text(text)
    before = content(folder)
    result = cli("release", folder / "r.toml", "-o", folder / out, "--store", tmp_path / "store")
    assert result.exit_code == 2 and "would change" in result.stderr and "an input" in result.stderr
    assert content(folder) == before


def test_a_variant_is_what_the_command_exports(inputs: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    keys = {"weights": "int4", "block": 16, "symmetric": True, "accuracy_level": 0, "head": "int4"}
    keys |= {"projections_dtype": "fp16", "vectors": "fp16", "method": "rtn"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    text = RECIPE.replace('weights = "int8"', "\n".join(lines)).replace("max_kl = 0.05", "min_retained = -9")
    recipe = inputs / "options.toml"
    recipe.write_text(text)
    made = cli("release", recipe, "-o", tmp_path / "out", "--store", store)
    assert made.exit_code == 0, made.stderr
    options = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items() if key != "symmetric"]
    for name in ("a", "b"):
        whole = ("export", inputs / "nf4", inputs / name, "-o", tmp_path / name, "--mode", "branch")
        assert cli(*whole, "--symmetric", *options).exit_code == 0
        released, exported = content(tmp_path / "out" / name / "onnx-branch-int4"), content(tmp_path / name)
        for file in ("onnx/model.onnx", "onnx/model.onnx_data", "adapters/default.onnx_adapter"):
            assert released[file] == exported[file], (name, file)


def test_a_second_run_does_nothing(inputs: Path, store: Path, released: Path, cli: Cli) -> None:
    before = content(released)
    result = cli("release", inputs / "r.toml", "-o", released, "--store", store)
    assert result.exit_code == 0 and result.stderr.count("unchanged") == 2
    assert content(released) == before


def test_another_folder_time_zone_and_worker_count_give_the_same_bytes(
    inputs: Path, released: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "some where" / "else"
    shutil.copytree(inputs, elsewhere)
    command = [
        sys.executable,
        "-m",
        "vera_edge",
        "release",
        str(elsewhere / "r.toml"),
        "-o",
        str(tmp_path / "o"),
    ]
    subprocess.run(
        [*command, "--store", str(tmp_path / "store"), "--workers", "2"],
        env={**os.environ, "TZ": "Pacific/Auckland", "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert content(tmp_path / "o") == content(released)


def test_a_bundle_can_be_made_again(inputs: Path, released: Path, cli: Cli) -> None:
    result = cli("release", "rebuild", released / "b" / NAME, "--inputs", inputs)
    assert result.exit_code == 0 and "the same bytes" in result.stdout


def test_other_inputs_are_refused_for_a_rebuild(
    inputs: Path, released: Path, tmp_path: Path, cli: Cli
) -> None:
    shutil.copytree(inputs, tmp_path / "inputs")
    shutil.rmtree(tmp_path / "inputs" / "a")
    shutil.copytree(inputs / "b", tmp_path / "inputs" / "a")
    result = cli("release", "rebuild", released / "a" / NAME, "--inputs", tmp_path / "inputs")
    assert result.exit_code == 2 and "the adapter here isn't the one" in result.stderr


@pytest.mark.parametrize(
    "changed", [{"sign": {"key": "mine.key"}}, {"limits": {"data": "/etc/hostname"}}], ids=["key", "path"]
)
def test_a_stranger_does_not_say_what_a_rebuild_reads(
    released: Path, inputs: Path, tmp_path: Path, cli: Cli, changed: dict[str, Any]
) -> None:
    folder = tmp_path / "stranger"
    shutil.copytree(released / "a" / NAME, folder)
    path = folder / "evidence" / "recipe.json"
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | changed))
    manifest = bundle.read(folder)
    (folder / bundle.MANIFEST).unlink()
    bundle.write(folder, bundle.change(manifest))
    result = cli("release", "rebuild", folder, "--inputs", inputs)
    assert result.exit_code == 2 and "names a key, or files by where they lie" in result.stderr


def test_a_gate_stops_its_variant_only(inputs: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = RECIPE.replace("max_kl = 0.05", "max_kl = 1e-9").replace(
        'id = "tiny"\npath', 'id = "tiny"\npath'
    )
    path = inputs / "strict.toml"
    path.write_text(recipe)
    result = cli("release", path, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 3 and "2 of 2 bundles were stopped" in result.stderr
    assert not (tmp_path / "out" / "a").exists()
    assert (tmp_path / "out" / "rejected" / "a" / NAME / "drift.json").is_file()
    junit = (tmp_path / "out" / "junit.xml").read_text()
    assert 'failures="2"' in junit and "mean KL is" in junit


@pytest.mark.parametrize("missing", ["nothing-here", "no-file-system-takes-this" * 20])
def test_an_unreadable_adapter_does_not_stop_the_others(
    inputs: Path, store: Path, released: Path, tmp_path: Path, cli: Cli, missing: str
) -> None:
    path = inputs / "broken.toml"
    path.write_text(RECIPE.replace('path = "a"', f'path = "{missing}"'))
    result = cli("release", path, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2 and "1 of 2 bundles failed: a/onnx-branch-int8" in result.stderr
    assert missing in result.stderr
    assert content(tmp_path / "out" / "b" / NAME) == content(released / "b" / NAME)
    assert not (tmp_path / "out" / "a").exists()


def test_a_signed_release(inputs: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    private, public = make_key(inputs, "publisher")
    path = inputs / "signed.toml"
    path.write_text(RECIPE + f'[sign]\nkey = "{private.name}"\npublic_key = "{public.name}"\n')
    out = tmp_path / "out"
    assert cli("release", path, "-o", out, "--store", store).exit_code == 0
    assert signing.check(out / "a" / NAME, Trust(public, required=True)) is not None
    # The signature has chance in it and the bundle hasn't: a second run leaves both.
    before = content(out)
    assert cli("release", path, "-o", out, "--store", store).stderr.count("unchanged") == 2
    assert content(out) == before


@pytest.mark.parametrize(
    ("sign", "sentence", "begun"),
    [
        ('key = "none.key"', "none.key can't be used", False),
        ('key = "one.key"\npublic_key = "none.pem"', "none.pem holds no trusted public key", False),
        ('key = "one.key"\npublic_key = "two.pem"', "was made by none of the 1 trusted keys", True),
    ],
)
def test_a_key_that_does_not_fit_is_told_and_nothing_published(
    inputs: Path, store: Path, tmp_path: Path, cli: Cli, sign: str, sentence: str, begun: bool
) -> None:
    """Before any work, where that can be known."""
    for name in ("one", "two"):
        make_key(inputs, name)
    path = inputs / "unsigned.toml"
    path.write_text(f"{RECIPE}[sign]\n{sign}\n")
    kept = store if begun else tmp_path / "store"
    result = cli("release", path, "-o", tmp_path / "out", "--store", kept)
    assert result.exit_code == 2 and sentence in result.stderr
    assert list((tmp_path / "out").glob("*/*/vera_edge.json")) == []
    assert begun or not list(kept.glob("*/*.lock")), "work was begun"


def test_plans_and_projections_from_the_seed(inputs: Path, store: Path, tmp_path: Path, cli: Cli) -> None:
    """A plan searched for, the same plan from a file, and a branch whose device draws its projections."""
    variants = """
[[variant]]
id = "searched"
weights = "plan"
max_kl = 0.02
calibration = "t.txt"
adapters = ["a"]
[[variant]]
id = "given"
weights = "plan"
plan = "plan.json"
calibration = "t.txt"
adapters = ["a"]
[[variant]]
id = "seeded"
mode = "branch"
weights = "nf4"
projections = "seed"
adapters = ["a"]
"""
    head, _, tail = RECIPE.partition("[[variant]]")
    path, out = inputs / "planned.toml", tmp_path / "out"
    path.write_text(
        head.replace("[[base]]", "golden = false\n[[base]]") + variants + tail[tail.index("[limits]") :]
    )
    made = cli("release", path, "-o", out, "--store", store)
    assert (
        made.exit_code == 2
        and "given" in made.stderr
        and f"{inputs / 'plan.json'} can't be read" in made.stderr
    )
    searched = bundle.read(out / "a" / "searched")
    assert len({step["result"] for step in (searched.plan or {})["steps"]}) > 1, (
        "one format for all is no plan"
    )
    (inputs / "plan.json").write_text(json.dumps(searched.plan))
    made = cli("release", path, "-o", out, "--store", store)
    assert made.exit_code == 0 and made.stderr.count("unchanged") == 2, made.stderr
    given = bundle.read(out / "a" / "given")
    assert given.files["onnx/model.onnx_data"] == searched.files["onnx/model.onnx_data"]
    seeded = bundle.verify(out / "a" / "seeded")
    assert len(seeded.generated) == 1 and not (seeded.folder / next(iter(seeded.generated))).exists()
    again = cli("release", "rebuild", out / "a" / "given", "--inputs", inputs)
    assert again.exit_code == 0, again.stderr


def test_a_fresh_run_takes_nothing_from_earlier_ones(
    inputs: Path, store: Path, released: Path, tmp_path: Path, cli: Cli
) -> None:
    """A damaged store is found when a bundle is put together, and --fresh makes it good."""
    for source, name in ((store, "store"), (released, "out")):
        shutil.copytree(source, tmp_path / name)
    words = ("release", inputs / "r.toml", "-o", tmp_path / "out", "--store", tmp_path / "store")
    graphs = [path for path in (tmp_path / "store").rglob("model.onnx_data") if path.stat().st_size > 99_999]
    for path in graphs:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
        path.chmod(0o444)
    assert cli(*words).stderr.count("unchanged") == 2
    shutil.rmtree(tmp_path / "out" / "b")
    result = cli(*words)
    assert result.exit_code == 2 and "was damaged after it was made; run again with --fresh" in result.stderr
    result = cli(*words, "--fresh")
    assert result.exit_code == 0 and result.stderr.count("built") == 2
    assert content(tmp_path / "out") == content(released)
    assert cli(*words, "--resume").stderr.count("unchanged") == 2


def test_the_model_card_shows_what_was_measured(released: Path) -> None:
    folder = released / "a" / NAME
    card = (folder / "README.md").read_text()
    drift = json.loads((folder / "evidence" / "drift.json").read_bytes())
    assert (
        f"| mean KL from the model as trained | {drift['fidelity']['kl']['mean']['value']:.3g} nats |" in card
    )
    for name in re.findall(r"\]\((evidence/[^)]+)\)", card):
        plot = ElementTree.parse(folder / name).getroot()
        assert plot.tag == "{http://www.w3.org/2000/svg}svg"
        classes = {mark.get("class") for mark in plot.iter()}
        assert any("fidelity" in (one or "") for one in classes) and "line effect" in classes
    assert card.count("](evidence/") == 2


def test_a_dry_run_touches_nothing(inputs: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("release", inputs / "r.toml", "-o", tmp_path / "out", "--dry-run", "--json")
    assert [entry["name"] for entry in json.loads(result.stdout)["bundles"]] == [f"a/{NAME}", f"b/{NAME}"]
    assert list(tmp_path.iterdir()) == []


def test_diff_names_what_changed(released: Path, cli: Cli) -> None:
    same = cli("diff", released / "a" / NAME, released / "a" / NAME, "--json")
    assert json.loads(same.stdout)["same"]
    found = json.loads(cli("diff", released / "a" / NAME, released / "b" / NAME, "--json").stdout)
    assert "adapters" in found["facts"] and "adapters/default.onnx_adapter" in found["files"]
    assert "onnx/model.onnx_data" not in found["files"]
    new = bundle.read(released / "b" / NAME)
    assert found["transfer"] < new.size - new.files["onnx/model.onnx_data"].size
