"""Golden vectors asked of the model as trained, for a bundle that the exporter made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import exported as exported_folders
from tests import tiny
from tests.conftest import Cli
from vera_edge.adapters import reading as adapters
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.check.validate import validate
from vera_edge.device.runtime.session import Session
from vera_edge.errors import DataError, MismatchError, OutputError, PlanError
from vera_edge.exporting import golden_vectors, target
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.trained import provenance

PROMPTS = ("The adapter", "Merge the two in float32, then quantize again")


@pytest.fixture(scope="module")
def exported(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("exported") / "branch"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="nf4")
    return out


def test_an_export_validates_against_the_model_as_trained(
    exported: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    limits = {"max_kl": 1e-4, "min_top1": 0.99}
    manifest = golden_vectors.ask(exported, tiny_llama.nf4, [(tiny_adapter, 1.0)], limits, PROMPTS)
    assert manifest.golden == "golden.json" and manifest.limits == limits
    assert bundle.verify(exported) == manifest
    result = validate(exported)
    assert result.passed, result.checks
    assert {drift.adapter for drift in result.drift} == {None, "default"}
    assert all(drift.positions > 20 and drift.greedy == 1 for drift in result.drift)
    tokens = np.arange(3, 60, dtype=np.int64)
    session = Session.open(exported)
    with_adapter = session.logits(tokens)
    session.swap(None)
    assert np.abs(with_adapter - session.logits(tokens)).max() > 0.1  # two models, both held


def test_another_base_or_adapter_is_refused(
    exported: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="made of another base"):
        golden_vectors.ask(exported, tiny_llama.fp32, [(tiny_adapter, 1.0)])
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=9)
    with pytest.raises(MismatchError, match="wasn't made of"):
        golden_vectors.ask(exported, tiny_llama.nf4, [(other, 1.0)])
    with pytest.raises(PlanError, match="name one adapter"):
        golden_vectors.ask(exported, tiny_llama.nf4, [])
    with pytest.raises(MismatchError, match="no adapter 'other'"):
        golden_vectors.attach(exported, {"other": Session.open(exported)}, "x")


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_the_reference_has_the_weight_that_the_bundle_has(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli, mode: str
) -> None:
    """At another weight it would be another model, which a bundle that does its work fails."""
    folder, tight = tmp_path / "half", {"max_kl": 1e-7, "min_top1": 1.0}
    target.export(tiny_llama.nf4, [(tiny_adapter, 0.5)], folder, mode=mode, weights="fp32")
    made = cli("golden", folder, tiny_llama.nf4, tiny_adapter, "--max-kl", 1e-7, "--min-top1", 1)
    assert made.exit_code == 0, made.stderr
    assert "at weight 0.5" in json.loads((folder / "golden.json").read_text())["reference"]
    result = validate(folder)
    assert result.passed, result.checks
    with pytest.raises(MismatchError, match=r"at weight 0\.5, not 1\.0"):
        golden_vectors.ask(folder, tiny_llama.nf4, [(tiny_adapter, 1.0)], tight, PROMPTS)
    golden_vectors.ask(folder, tiny_llama.nf4, [(tiny_adapter, 0.5)], tight, PROMPTS)
    assert validate(folder).passed
    # The other model is told apart by these limits: PEFT's own, at weight 1.
    ids = exported_folders.tokens()
    whole = trained(tiny_llama.nf4, tiny_adapter).logits(ids)
    assert exported_folders.divergence(whole, Session.open(folder).logits(ids)) > 1e-4


def trained(base: Path, adapter: Path) -> TorchReference:
    checkpoint = Checkpoint.open(base)
    read = adapters.read(adapter)
    return open_reference(checkpoint, [(read, 1.0)], provenance.resolve(read, checkpoint).projections)


def test_a_model_that_is_run_layer_by_layer_says_the_same(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    folder, found = tmp_path / "bundle", []
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], folder, mode="branch", weights="nf4")
    for memory in ((), ("--max-memory", "1KB")):
        made = cli("golden", folder, tiny_llama.nf4, tiny_adapter, *memory)
        assert made.exit_code == 0, made.stderr
        found.append(json.loads((folder / "golden.json").read_text()))
    whole, light = (read["cases"] for read in found)
    assert [case["tokens"] for case in light] == [case["tokens"] for case in whole]
    assert light == whole


def test_several_merged_adapters_are_asked_each_at_its_weight(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    """Two folders of one name too: the manifest tells them apart."""
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / tiny_adapter.name, vectors_seed=9)
    folder, pairs = tmp_path / "both", [(tiny_adapter, 0.25), (other, -0.75)]
    target.export(tiny_llama.nf4, pairs, folder, mode="merged", weights="fp32")
    weights = {entry["digest"]: entry["weight"] for entry in bundle.read(folder).adapters.values()}
    assert sorted(weights.values()) == [-0.75, 0.25]
    made = cli("golden", folder, tiny_llama.nf4, other, tiny_adapter, "--max-kl", 1e-7)
    assert made.exit_code == 0, made.stderr
    assert validate(folder).passed
    with pytest.raises(PlanError, match="name every merged adapter"):
        golden_vectors.ask(folder, tiny_llama.nf4, [(other, None)])
    with pytest.raises(MismatchError, match=r"at weight -0\.75, not 0\.25"):
        golden_vectors.ask(folder, tiny_llama.nf4, [(other, 0.25), (tiny_adapter, -0.75)])


def test_several_adapters_of_a_branch_are_asked_one_by_one(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=9)
    folder, pairs = tmp_path / "both", [(tiny_adapter, 1.0), (other, -0.5)]
    target.export(tiny_llama.nf4, pairs, folder, mode="branch", weights="nf4")
    asked = [(tiny_adapter, None), (other, None)]
    golden_vectors.ask(folder, tiny_llama.nf4, asked, {"max_kl": 1e-7, "min_top1": 1.0}, PROMPTS)
    result = validate(folder)
    assert result.passed, result.checks
    assert [one.adapter for one in result.drift] == [None, "default", "other"] and not result.notes
    golden_vectors.ask(folder, tiny_llama.nf4, asked[:1], {"max_kl": 1e-7}, PROMPTS)
    assert validate(folder).notes == ("there are no golden vectors of adapter other: not judged",)


def test_other_projections_than_the_bundles_are_refused(
    exported: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    asked = (exported, tiny_llama.nf4, [(tiny_adapter, 1.0)])
    with pytest.raises(MismatchError, match="was made with other projections than these"):
        golden_vectors.ask(*asked, prompts=PROMPTS, projection_rounding="bfloat16")


def test_the_command_says_what_it_wrote(
    exported: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    told = json.loads(cli("golden", folder, tiny_llama.nf4, tiny_adapter, "--max-kl", 0.1, "--json").stdout)
    manifest = bundle.verify(folder)
    assert told == {
        "digest": manifest.digest,
        "file": "golden.json",
        "size": manifest.files["golden.json"].size,
    }
    assert manifest.limits == {"max_kl": 0.1}


@pytest.mark.parametrize(
    "limits", [{"max_kl": float("nan")}, {"max_kl": float("inf")}, {"max_kl": -1}, {"min_top1": 99}]
)
def test_a_limit_that_nothing_can_keep_is_refused(
    exported: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, limits: dict[str, float]
) -> None:
    with pytest.raises(PlanError, match=r"options: m\w+_"):
        golden_vectors.ask(exported, tiny_llama.nf4, [(tiny_adapter, 1.0)], limits)
    with pytest.raises(PlanError, match=r"options: m\w+_"):
        validate(exported, limits=limits)


def test_a_bundle_stays_as_it_was_when_its_golden_vectors_cannot_be_listed(
    exported: Path,
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "bundle"))
    before = bundle.verify(folder)

    def full(*_: object) -> None:
        raise OutputError("no space left")

    asked = (folder, tiny_llama.nf4, [(tiny_adapter, 1.0)], None, PROMPTS)
    with monkeypatch.context() as changed, pytest.raises(OutputError, match="no space"):
        changed.setattr(bundle, "_write", full)
        golden_vectors.ask(*asked)
    assert bundle.verify(folder) == before
    (folder / bundle.SIGNATURE).write_text("signed")
    with pytest.raises(OutputError, match="is signed"):
        golden_vectors.ask(*asked)


def test_prompts_come_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \n")
    assert golden_vectors.read_prompts(path) == ("one", "two")
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        golden_vectors.read_prompts(path)
    with pytest.raises(DataError, match="can't be read"):
        golden_vectors.read_prompts(tmp_path / "none")
