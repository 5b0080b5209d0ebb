"""Every kind of head has a gate that another model in its place fails: classes, labels, values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_bundle, tiny_encoder
from tests.conftest import Cli
from tests.families import Family
from vera_edge.bundle import contents as bundle
from vera_edge.device.check.validate import validate
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.errors import BundleError, PlanError
from vera_edge.exporting import golden_vectors, target

VALUES = {"max_relative_error": 1e-3, "max_largest_error": 1e-2, "min_rank_correlation": 0.999}
CLASSES = {"max_kl": 1e-5, "min_top1": 1.0}
MULTI, REGRESSION = {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}
# What the config says, and the limits that the model is released with.
HEADS: Mapping[str, tuple[dict[str, Any], dict[str, float]]] = {
    "one class": ({"num_labels": 3}, CLASSES),
    "two classes": ({"num_labels": 2}, CLASSES),
    "labels": ({"num_labels": 3, **MULTI}, CLASSES),
    "one label": ({"num_labels": 1, **MULTI}, CLASSES),
    "one logit": ({"num_labels": 1}, VALUES),
    "regression": ({"num_labels": 1, **REGRESSION}, VALUES),
    "two regressions": ({"num_labels": 2, **REGRESSION}, VALUES),
}


@dataclass(frozen=True)
class Head:
    """A base, an adapter, their branch export with golden vectors, and another model's of the same shape."""

    base: Path
    adapter: Path
    out: Path
    other: Path
    limits: dict[str, float]


def family(config: Mapping[str, Any]) -> Family:
    return Family(
        "BertForSequenceClassification",
        tiny_encoder.EMBEDDINGS.targets,
        {**tiny_encoder.EMBEDDINGS.config, **config},
    )


@pytest.fixture(scope="module", params=HEADS)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Head:
    root = tmp_path_factory.mktemp("head")
    config, limits = HEADS[request.param]
    made = family(config)
    base, adapter = tiny_encoder.make(made, root)
    out = root / "out"
    target.export(base, [(adapter, 1.0)], out, mode="branch", weights="fp32")
    golden_vectors.ask(out, base, [(adapter, 1.0)], limits)
    # The same answers, each by -50 and 3 more: no class, label or order of before, but one logit's softmax.
    model = made.load(base)
    model.classifier.weight.data *= -50
    model.classifier.bias.data = model.classifier.bias.data * -50 + 3
    model.save_pretrained(root / "other base")
    tiny_encoder.save_tokenizer(root / "other base")
    other = root / "other"
    target.export(root / "other base", [(adapter, 1.0)], other, mode="branch", weights="fp32")
    return Head(base, adapter, out, other, limits)


def failed(folder: Path, **limits: float) -> set[str]:
    return {check.name for check in validate(folder, limits=limits).checks if not check.passed}


def test_a_sound_bundle_passes_and_another_models_graph_fails(head: Head, tmp_path: Path, cli: Cli) -> None:
    assert bundle.read(head.out).limits == head.limits
    assert failed(head.out) == set()
    folder = shutil.copytree(head.out, tmp_path / "b")
    shutil.rmtree(folder / "onnx")
    shutil.copytree(head.other / "onnx", folder / "onnx")
    tiny_bundle.rewrite(folder)
    assert failed(folder) >= {"drift (base)", "drift (default)"}
    for name, bound in head.limits.items():  # each limit by itself
        tiny_bundle.rewrite(folder, limits={name: bound})
        assert failed(folder) >= {"drift (base)", "drift (default)"}, name
    shown = cli("validate", folder)
    assert (
        shown.exit_code == 3
        and ("mean KL" if "max_kl" in head.limits else "rank correlation") in shown.stdout
    )


def test_another_adapter_fails(head: Head, tmp_path: Path) -> None:
    folder = shutil.copytree(head.out, tmp_path / "b")
    vectors = dict(Encoder.open(head.out).vectors)
    changed = {name: -value if name.endswith("lambda_b") else value for name, value in vectors.items()}
    version = bundle.read(folder).model_version
    assert version is not None
    tiny_bundle.write_adapter(folder / "adapters" / "default.onnx_adapter", changed, version)
    tiny_bundle.rewrite(folder)
    assert failed(folder) == {"drift (default)"}


def test_a_limit_on_what_this_head_does_not_give_is_refused_and_fails(head: Head, tmp_path: Path) -> None:
    wrong = {"max_kl": 1.0} if head.limits is VALUES else {"min_rank_correlation": 0.0}
    name = next(iter(wrong))
    folder = shutil.copytree(head.out, tmp_path / "b")
    with pytest.raises(PlanError, match=f"{name} isn't measured of this kind of model; set"):
        golden_vectors.ask(folder, head.base, [(head.adapter, 1.0)], wrong)
    assert failed(head.out, **wrong) == {"limits"}
    tiny_bundle.rewrite(folder, limits=wrong)  # as bundles were released before
    assert failed(folder) == {"limits"}


def test_the_command_sets_and_replaces_limits_on_values(head: Head, tmp_path: Path, cli: Cli) -> None:
    if head.limits is not VALUES:
        return
    folder = shutil.copytree(head.out, tmp_path / "b")
    words = ("--max-relative-error", 0.01, "--max-largest-error", 0.1, "--min-rank-correlation", 0.9)
    made = cli("golden", folder, head.base, head.adapter, *words)
    assert made.exit_code == 0, made.stderr
    assert bundle.read(folder).limits == {
        "max_relative_error": 0.01, "max_largest_error": 0.1, "min_rank_correlation": 0.9
    }  # fmt: skip
    assert cli("validate", folder).exit_code == 0
    strict = cli("validate", folder, "--max-relative-error", 0)
    assert strict.exit_code == 3 and "max_relative_error" in strict.stdout


def test_an_artefact_is_held_by_drift_as_a_device_is(head: Head, tmp_path: Path, cli: Cli) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{text} {number}" for number in range(4) for text in tiny_encoder.TEXTS))
    limits = tmp_path / "limits.toml"
    lines = [f"{name} = {bound}" for name, bound in head.limits.items()]
    limits.write_text("\n".join(["[limits]", *lines]))
    words = ("--base", head.base, "--data", text, "--limits", limits, "--json")
    kept = cli("drift", head.adapter, head.out, *words)
    assert kept.exit_code == 0, kept.stdout + kept.stderr
    lost = cli("drift", head.adapter, head.other, *words)
    assert lost.exit_code == 3
    states = {one["limit"]: one["state"] for one in json.loads(lost.stdout)["outcomes"]}
    assert states == {**dict.fromkeys(head.limits, "broken"), "min_retained": "broken"}
    limits.write_text("[limits]\nmax_flips = 0.1\n")
    refused = cli("drift", head.adapter, head.out, *words)
    assert refused.exit_code == 2 and "of this model only" in refused.stderr
    table = cli("drift", head.adapter, head.out, *words[:4]).stdout
    assert ("kl" if "max_kl" in head.limits else "largest error") in table


def test_artefacts_whose_logits_stand_for_something_else_are_refused(tmp_path: Path, cli: Cli) -> None:
    made = family({"num_labels": 3})
    base, _ = tiny_encoder.make(made, tmp_path)
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | MULTI))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny_encoder.TEXTS))
    refused = cli("drift", base, other, "--data", text)
    assert refused.exit_code == 2 and "one gives several labels, the other one class" in refused.stderr


@pytest.mark.parametrize(
    ("model", "measured"),
    [("BertForTokenClassification", 0), ("BertForQuestionAnswering", 0), ("BertForMaskedLM", 2)],
)
def test_heads_that_answer_for_every_token_are_not_judged_on_a_device(
    tmp_path: Path, cli: Cli, model: str, measured: int
) -> None:
    """Refused, rather than passed by figures that mean nothing; drift measures tags and spans."""
    made = Family(model, tiny_encoder.EMBEDDINGS.targets, tiny_encoder.EMBEDDINGS.config)
    base, adapter = tiny_encoder.make(made, tmp_path)
    out = tmp_path / "out"
    target.export(base, [(adapter, 1.0)], out, mode="branch", weights="fp32")
    with pytest.raises(BundleError, match="open it in ONNX Runtime itself"):
        golden_vectors.ask(out, base, [(adapter, 1.0)], {"max_kl": 1e-9})
    with pytest.raises(BundleError, match="open it in ONNX Runtime itself"):
        validate(out)
    drifted = cli("drift", adapter, out, "--base", base)
    assert drifted.exit_code == measured, drifted.stderr
    assert measured == 0 or drifted.stderr.count("\n") == 1
