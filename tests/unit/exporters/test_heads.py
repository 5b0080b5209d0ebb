"""Exports and merges of adapters trained under another head than their base has, against PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests import exported, heads
from tests.families import FAMILIES
from tests.heads import DECODERS, ENCODERS, Trained
from vera_edge import merging as merge
from vera_edge.bundle import contents as bundle
from vera_edge.errors import MismatchError, TargetError
from vera_edge.exporting import onnx_adapter as packing
from vera_edge.exporting import target
from vera_edge.exporting.exporter import Export
from vera_edge.rounding.weight_rounding import Rounding

Array = npt.NDArray[Any]
ALL = {**ENCODERS, **DECODERS}
Make = Callable[[str], "Case"]


class Case:
    def __init__(self, trained: Trained, root: Path) -> None:
        self.trained, self.root = trained, root
        self.base, self.adapter = trained.make(root)
        self.padding = trained.config.get("pad_token_id", 0)

    def export(self, mode: str, **options: Any) -> Export:
        out = self.root / f"{mode}-{options.get('weights')}"
        options = {"weights": "fp32", **options}
        return target.export(self.base, [(self.adapter, 1.0)], out, mode=mode, force=True, **options)

    def run(self, folder: Path, feeds: dict[str, Array], active: bool = True) -> list[Array]:
        import onnxruntime

        running, options = exported.session(folder), onnxruntime.RunOptions()
        vectors = folder / "adapters" / "default.onnx_adapter"
        if active and vectors.is_file():
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(vectors))
            options.add_active_adapter(loaded)
        given = {"token_type_ids": np.zeros_like(feeds["input_ids"]), **feeds}
        taken = {value.name: given[value.name] for value in running.get_inputs() if value.name in given}
        found: list[Array] = running.run(None, taken, options)
        return found[: 2 if "start_logits" in [value.name for value in running.get_outputs()] else 1]

    def error(self, found: list[Array], truth: list[Array], feeds: dict[str, Array]) -> float:
        """The largest difference where there is a token, relative to the truth's scale."""
        assert [one.shape for one in found] == [one.shape for one in truth]
        there = feeds["attention_mask"].astype(bool)
        of_tokens = truth[0].shape[:2] == there.shape
        pairs = [
            (one[there], other[there]) if of_tokens else (one, other)
            for one, other in zip(found, truth, strict=True)
        ]
        return max(exported.error(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    done: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in done:
            done[name] = Case(ALL[name], tmp_path_factory.mktemp(name.replace(" ", "-")))
        return done[name]

    return case


@pytest.mark.parametrize("name", ALL)
def test_a_merged_export_is_the_model_that_was_trained(name: str, make: Make) -> None:
    case = make(name)
    made = case.export("merged")
    for side in ("right", "left") if name in DECODERS else ("right",):
        feeds = heads.feeds(case.padding, side)
        truth = case.trained.truth(case.base, case.adapter, feeds)
        assert case.error(case.run(made.folder, feeds), truth, feeds) < 1e-5
    without = case.trained.truth(case.base, case.adapter, feeds, active=False)
    assert case.error(without, truth, feeds) > 0.01  # so that a lost adapter would have failed
    config = json.loads((made.folder / "config.json").read_text())
    assert bundle.read(made.folder).base["architecture"] == config["architectures"][0]
    assert any("as trained" in note for note in made.notes)


@pytest.mark.parametrize("name", ["roberta classes", "roberta spans", "distilbert classes", "qwen3 classes"])
def test_a_branch_has_the_head_and_swaps_the_rest(name: str, make: Make) -> None:
    case = make(name)
    made = case.export("branch")
    feeds = heads.feeds(case.padding)
    truth = case.trained.truth(case.base, case.adapter, feeds)
    assert case.error(case.run(made.folder, feeds), truth, feeds) < 1e-5
    # Without its vectors: the base's layers under the head that was trained, for the base has none.
    off = case.trained.train(case.base)
    for parameter, value in off.named_parameters():
        if "vera_lambda_b" in parameter:
            value.data.zero_()
    import torch

    with torch.no_grad():
        expected = heads.outputs(off(**{key: torch.from_numpy(value) for key, value in feeds.items()}))
    assert case.error(case.run(made.folder, feeds, active=False), expected, feeds) < 1e-5


def test_an_adapter_with_the_head_that_the_graph_holds_can_be_packed(make: Make, tmp_path: Path) -> None:
    """The graph has one head; vectors trained under another one don't belong to it."""
    case = make("distilbert classes")
    made = case.export("branch")
    packed = packing.pack_folder(case.adapter, made.folder, tmp_path / "same.onnx_adapter")
    assert packed.path.read_bytes() == (made.folder / "adapters" / "default.onnx_adapter").read_bytes()
    from safetensors.numpy import load_file, save_file

    other = Path(shutil.copytree(case.adapter, tmp_path / "other"))
    stored = load_file(other / "adapter_model.safetensors")
    name = next(name for name in stored if name.endswith(".classifier.weight"))
    save_file(stored | {name: stored[name] + 1}, other / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"also trained classifier\.weight"):
        packing.pack_folder(other, made.folder, tmp_path / "other.onnx_adapter")
    again = target.export(case.base, [(other, 1.0)], tmp_path / "again", mode="branch")
    versions = {bundle.read(folder).model_version for folder in (made.folder, again.folder)}
    assert len(versions) == 2  # so that ONNX Runtime's files for one aren't taken for the other


@pytest.mark.parametrize("name", ALL)
def test_a_merged_folder_loads_as_the_class_that_was_trained(name: str, make: Make) -> None:
    case = make(name)
    report = merge.to_folder(case.base, [(case.adapter, 1.0)], case.root / "folder", to="fp32", force=True)
    feeds = heads.feeds(case.padding)
    truth = case.trained.truth(case.base, case.adapter, feeds)
    assert case.error(case.trained.loaded(report.folder, feeds), truth, feeds) < 1e-5
    config = json.loads((report.folder / "config.json").read_text())
    if case.trained.labels is not None:
        assert list(config["id2label"].values()) == [f"LABEL_{n}" for n in range(case.trained.labels)]
        assert config["label2id"] == {f"LABEL_{n}": n for n in range(case.trained.labels)}
    assert "lm_head.weight" not in (report.folder / "model.safetensors").read_bytes()[:20_000].decode(
        "latin1"
    )


@pytest.mark.parametrize("name", ["roberta embeddings", "bert, no task type", "gpt2 classes"])
def test_text_calibrates_whatever_prefix_the_layers_have(name: str, make: Make) -> None:
    """The class that was trained has more of a prefix than the checkpoint, or less."""
    case = make(name)
    made = case.export("merged", weights="int4", rounding=Rounding(tokens=512))
    assert any("rounded by gptq" in note for note in made.notes)
    feeds = heads.feeds(case.padding)
    truth = case.trained.truth(case.base, case.adapter, feeds)
    assert case.error(case.run(made.folder, feeds), truth, feeds) < 0.35


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["roberta classes", "qwen2 classes"])
def test_smaller_weights_stay_near(name: str, weights: str, make: Make) -> None:
    case = make(name)
    made = case.export("merged", weights=weights)
    feeds = heads.feeds(case.padding)
    truth = case.trained.truth(case.base, case.adapter, feeds)
    assert case.error(case.run(made.folder, feeds), truth, feeds) < 0.35
    assert np.isfinite(case.run(made.folder, feeds)[0]).all()


def test_a_classifier_of_images_on_a_bare_base(tmp_path: Path) -> None:
    """As trained on the usual base of ViTs: its class has a pooler and no head, PEFT records no task type."""
    import torch

    images = FAMILIES["vit"]
    head = {"modules_to_save": ["classifier"]}
    trained = Trained(
        "ViTModel", "AutoModelForImageClassification", None, ("q_proj", "fc2"), images.config, 5, head
    )
    base, adapter = trained.make(tmp_path)
    pixels = images.inputs()["pixel_values"]
    with torch.no_grad():
        truth = trained.train(base)(pixels).logits.numpy()
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    assert exported.error(trained.loaded(tmp_path / "m", {"pixel_values": pixels.numpy()})[0], truth) < 1e-5
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    found = exported.session(made.folder).run(["logits"], {"pixel_values": pixels.numpy()})[0]
    assert found.shape == (1, 5) and exported.error(found, truth) < 1e-5


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings_are_in_the_graph_or_refused(rope: dict[str, Any], tmp_path: Path) -> None:
    one = DECODERS["llama reward"]
    config = {**one.config, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    trained = Trained(**{**vars(one), "config": config})
    base, adapter = trained.make(tmp_path)
    if rope["rope_type"] == "dynamic":
        with pytest.raises(TargetError, match=r"by a text's length \(dynamic\)") as caught:
            target.export(base, [(adapter, 1.0)], tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    feeds = heads.feeds(length=40)
    truth = trained.truth(base, adapter, feeds)[0]
    assert exported.error(exported.session(made.folder).run(["logits"], feeds)[0], truth) < 1e-5
