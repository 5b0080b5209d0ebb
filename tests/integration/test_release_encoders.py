"""Releases of encoders: gated, described and validated by what they are for; what can't be is told before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny_encoder
from tests.conftest import Cli
from tests.families import FAMILIES, Family
from tests.tiny_encoder import TEXTS
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.exporting import target

HEAD = '[release]\nname = "tiny"\n'
LIMITS = '[limits]\ndata = "t.txt"\n'


def _family(**config: Any) -> Family:
    return Family(
        "BertForSequenceClassification",
        tiny_encoder.EMBEDDINGS.targets,
        {**tiny_encoder.EMBEDDINGS.config, **config},
    )


MODELS = {
    "embeddings": tiny_encoder.EMBEDDINGS,
    "classes": tiny_encoder.classifier(),
    "labels": _family(num_labels=3, problem_type="multi_label_classification"),
    "values": _family(num_labels=1),
}
GATES = {
    "embeddings": "min_cosine = 0.999\nmin_rank_correlation = 0.99\nmin_overlap = 0.7\n",
    "classes": "max_kl = 0.01\nmin_top1 = 0.8\n",
    "labels": "max_kl = 0.01\nmin_top1 = 0.6\n",
    "values": "max_relative_error = 0.2\nmax_largest_error = 1.5\nmin_rank_correlation = 0.9\n",
}
IN_THE_CARD = {
    "embeddings": "mean cosine with the model as trained",
    "classes": "texts with the same answer",
    "labels": "mean KL from the model as trained",
    "values": "mean error in the reference's standard deviations",
}


def recipe(folder: Path, gates: str, *variants: str, golden: bool = True) -> Path:
    base = '[[base]]\nid = "m"\npath = "base"\n'
    adapters = "".join(f'[[adapter]]\nid = "{name}"\nbase = "m"\npath = "{name}"\n' for name in ("a", "b"))
    path = folder / "r.toml"
    text = HEAD + f"golden = {str(golden).lower()}\n" + base + adapters
    path.write_text(text + "".join(f"[[variant]]\n{one}\n" for one in variants) + LIMITS + gates)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By kind of model: a base, two adapters, and text."""
    root = tmp_path_factory.mktemp("encoders")
    for kind, family in MODELS.items():
        _, adapter = tiny_encoder.make(family, root / kind)
        adapter.rename(root / kind / "a")
        file = shutil.copytree(root / kind / "a", root / kind / "b") / "adapter_model.safetensors"
        tensors = load_file(file)
        changed = {key: -value if "lambda_b" in key else value for key, value in tensors.items()}
        save_file(changed, file, {"format": "pt"})
        texts = [f"{text} {number}" for number in range(5) for text in TEXTS]
        (root / kind / "t.txt").write_text("\n\n".join(texts))
    return root


@pytest.mark.parametrize("kind", MODELS)
def test_an_encoder_is_released_whole(inputs: Path, tmp_path: Path, cli: Cli, kind: str) -> None:
    folder = inputs / kind
    variants = ('mode = "branch"\nweights = "fp32"', 'mode = "merged"\nweights = "int8"')
    words = ("release", recipe(folder, GATES[kind], *variants), "-o", tmp_path / "out")
    made = cli(*words, "--store", tmp_path / "store")
    assert made.exit_code == 0, made.stdout + made.stderr
    for name in ("a/onnx-branch-fp32", "a/onnx-merged-int8", "b/onnx-branch-fp32"):
        released = tmp_path / "out" / name
        manifest = bundle.verify(released)
        assert manifest.kind == "encoder" and manifest.golden == "golden.json"
        limits = dict(line.split(" = ") for line in GATES[kind].splitlines())
        assert {key: manifest.limits[key] for key in limits} == {k: float(v) for k, v in limits.items()}
        card = (released / "README.md").read_text()
        assert IN_THE_CARD[kind] in card and "40 texts" not in card and "25 texts" in card
        assert json.loads((released / "evidence" / "drift.json").read_bytes())["kind"] == "encoder"
        validated = cli("validate", released, "--json")
        assert validated.exit_code == 0, validated.stdout
        adapters = {row["adapter"] for row in json.loads(validated.stdout)["encoder_drift"]}
        assert adapters == ({None, "default"} if manifest.mode == "branch" else {None})
    again = cli(*words, "--store", tmp_path / "store")
    assert again.exit_code == 0 and again.stderr.count("unchanged") == 4
    summary = (tmp_path / "out" / "SUMMARY.md").read_text()
    assert summary.count("| ok |") == 4
    if kind != "embeddings":  # one kind stands for all: nothing of it is told apart there
        return
    rebuilt = cli("release", "rebuild", tmp_path / "out" / "a" / "onnx-branch-fp32", "--inputs", folder)
    assert rebuilt.exit_code == 0, rebuilt.stdout + rebuilt.stderr


def test_a_released_branch_gives_what_its_export_gives(inputs: Path, tmp_path: Path, cli: Cli) -> None:
    """Both adapters share one graph, each with its own vectors."""
    folder = inputs / "embeddings"
    path = recipe(folder, "", 'mode = "branch"\nweights = "fp32"', golden=False)
    assert cli("release", path, "-o", tmp_path / "out", "--store", tmp_path / "store").exit_code == 0
    for name in ("a", "b"):
        out = tmp_path / name
        target.export(folder / "base", [(folder / name, 1.0)], out, mode="branch", weights="fp32")
        truth = Encoder.open(out).embed(TEXTS)
        released = Encoder.open(tmp_path / "out" / name / "onnx-branch-fp32")
        assert (released.embed(TEXTS) == truth).all()
        assert released.manifest.golden is None


def test_a_gate_stops_an_encoder(inputs: Path, tmp_path: Path, cli: Cli) -> None:
    folder = inputs / "values"
    path = recipe(folder, "max_relative_error = 1e-9\n", 'weights = "int8"')
    made = cli("release", path, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert made.exit_code == 3 and "2 of 2 bundles were stopped" in made.stderr
    assert "mean error in standard deviations of the reference is" in made.stderr


@pytest.mark.parametrize(
    ("kind", "gates", "says"),
    [
        ("embeddings", "min_top1 = 0.9\n", "min_top1 can't be held: of BertModel only min_cosine"),
        ("classes", "min_cosine = 0.9\n", "min_cosine can't be held"),
        (
            "values",
            "max_kl = 0.1\n",
            "max_kl can't be held: of BertForSequenceClassification only max_relative",
        ),
        ("labels", "min_overlap = 0.1\n", "min_overlap can't be held"),
    ],
)
def test_a_limit_that_is_not_measured_is_told_before_the_export(
    inputs: Path, tmp_path: Path, cli: Cli, kind: str, gates: str, says: str
) -> None:
    path = recipe(inputs / kind, gates, 'weights = "int8"')
    made = cli("release", path, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert made.exit_code == 2 and says in made.stderr, made.stderr
    assert not list((tmp_path / "store").glob("[0-9a-f][0-9a-f]"))  # nothing was exported


@pytest.mark.parametrize("model", ["BertForMaskedLM", "BertForTokenClassification", "vit"])
def test_what_is_not_measured_at_all_is_told_before_the_export(tmp_path: Path, cli: Cli, model: str) -> None:
    family = (
        FAMILIES["vit"]
        if model == "vit"
        else Family(model, tiny_encoder.EMBEDDINGS.targets, tiny_encoder.EMBEDDINGS.config)
    )
    base, adapter = tiny_encoder.make(family, tmp_path)
    adapter.rename(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "t.txt").write_text("\n\n".join(TEXTS * 4))
    made = cli(
        "release", recipe(tmp_path, "", 'weights = "int8"'), "-o", tmp_path / "out", "--store", base / "s"
    )
    assert made.exit_code == 2 and "drift is measured of models that give text" in made.stderr
    assert not list((base / "s").glob("[0-9a-f][0-9a-f]"))
