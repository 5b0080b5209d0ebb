"""Whole exports of tiny encoders and classifiers, held against PEFT's own unmerged forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from tests import exported
from tests.families import FAMILIES, VOCABULARY, Family
from vera_edge.bundle import contents as bundle
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.merging.computed import ComputedTensors
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge_onnx import float_copy
from vera_edge_onnx.encoder import drawing
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.skeleton import Computed, Skeleton

Array = npt.NDArray[Any]
Make = Callable[..., "Case"]

_BERT = ("query", "key", "value", "dense")
_TEXT = {**FAMILIES["bert"].config, "hidden_size": 64, "num_hidden_layers": 2}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 1,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
_WHISPER = {**FAMILIES["whisper"].config, "encoder_layers": 1, "decoder_layers": 1}
# All linears of the encoder's only layer, by names that the decoder's don't end with.
_IN_ENCODER = tuple(
    f"encoder.layers.0.{name}"
    for name in (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "fc1", "fc2")
)
MODELS = {
    "bert": Family("BertModel", _BERT, _TEXT),
    "roberta": Family(
        "RobertaModel", _BERT, {**_TEXT, "num_hidden_layers": 1, "pad_token_id": 1, "type_vocab_size": 1}
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2", "pre_classifier"),
        _DISTILBERT,
    ),
    "whisper": Family(
        "WhisperForAudioClassification",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        {**FAMILIES["whisper"].config, "encoder_layers": 1, "classifier_proj_size": 16},
    ),
    "whisper encoder": Family("WhisperModel", _IN_ENCODER, _WHISPER),
    "whole whisper": Family("WhisperForConditionalGeneration", _IN_ENCODER, _WHISPER),
    "vit": replace(FAMILIES["vit"], config={**FAMILIES["vit"].config, "num_hidden_layers": 1}),
}


class Case:
    """An export, and the model it was made of."""

    def __init__(self, family: Family, base: Path, adapter: Path, out: Path) -> None:
        self.family, self.base, self.adapter, self.out = family, base, adapter, out
        self.session = exported.session(out)

    def error(self, feeds: Mapping[str, Array], active: bool = True) -> float:
        """Largest difference from PEFT's first output, relative to its scale."""
        truth = self.truth(feeds, active)
        return exported.error(self.run(feeds, active), truth)

    def run(self, feeds: Mapping[str, Array], active: bool = True) -> Array:
        import onnxruntime

        options, vectors = onnxruntime.RunOptions(), self.out / "adapters" / "default.onnx_adapter"
        if active and vectors.is_file():
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(vectors))
            options.add_active_adapter(loaded)
        found: Array = self.session.run(None, dict(feeds), options)[0]
        return found

    def truth(self, feeds: Mapping[str, Array], active: bool = True) -> Array:
        import torch
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.family.load(self.base), self.adapter).eval()
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
        half = self.family.targets == _IN_ENCODER
        forward = model.get_base_model().get_encoder() if half else model
        with torch.no_grad():
            if active:
                found = forward(**inputs)
            else:
                with model.disable_adapter():
                    found = forward(**inputs)
        result: Array = found[0].numpy()
        return result

    def feeds(self, rows: int, length: int) -> dict[str, Array]:
        """Inputs for `rows` texts, the last one padded, or images."""
        draw = np.random.default_rng(rows * 100 + length)
        if "ViT" in self.family.model:
            return {"pixel_values": draw.standard_normal((rows, 3, 16, 16)).astype(np.float32)}
        if "Whisper" in self.family.model:
            return {"input_features": draw.standard_normal((rows, 16, 64)).astype(np.float32)}
        mask = np.ones((rows, length), np.int64)
        if rows > 1:
            mask[-1, -2:] = 0
        found: dict[str, Array] = {"input_ids": draw.integers(3, VOCABULARY, (rows, length))}
        found["attention_mask"] = mask
        if self.family.model == "BertModel":
            found["token_type_ids"] = draw.integers(0, 2, (rows, length))
        return found


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Exports, each made once: make(family, mode, weights), and what its linears read when it isn't float."""
    made: dict[str, tuple[Path, Path]] = {}
    done: dict[tuple[str, ...], Case] = {}

    def export(name: str, mode: str, weights: str, activations: str = "float") -> Case:
        family = MODELS[name]
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            family.make().save_pretrained(root / "base")
            made[name] = root / "base", family.adapted(root / "base", root / "adapter")
        if (name, mode, weights, activations) not in done:
            base, adapter = made[name]
            out = tmp_path_factory.mktemp("export") / "out"
            options = {"activations": activations}
            with pytest.MonkeyPatch.context() as patch:
                patch.delattr(float_copy, "write")  # none is drawn from weights
                target.export(base, [(adapter, 1.0)], out, mode=mode, weights=weights, options=options)
            done[name, mode, weights, activations] = Case(family, base, adapter, out)
        return done[name, mode, weights, activations]

    return export


@pytest.mark.parametrize("name", MODELS)
def test_merged_fp32_agrees_with_peft(name: str, make: Make) -> None:
    case = make(name, "merged", "fp32")
    for rows, length in ((1, 12), (3, 5), (1, 1)):
        feeds = case.feeds(rows, length)
        assert case.error(feeds) < 1e-5
    feeds = case.feeds(3, 5)
    base = case.truth(feeds, active=False)
    assert exported.error(base, case.truth(feeds)) > 0.1  # so that a lost adapter would have failed


def test_one_drawn_from_its_weights_is_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("distilbert", "merged", "int8", "dynamic")

    def refuse(source: ComputedTensors) -> Skeleton:
        raise Computed("a weight is scaled")

    monkeypatch.setattr(Skeleton, "of", refuse)
    options = {"activations": "dynamic"}
    target.export(case.base, [(case.adapter, 1.0)], tmp_path / "out", weights="int8", options=options)
    assert exported.files(tmp_path / "out") == exported.files(case.out)


def test_where_the_exporter_computed_with_weights_they_are_drawn_from(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a skeleton's graph lacks then is seen when it is held against the model."""
    case, take_out = make("distilbert", "merged", "fp32"), Skeleton.take_out
    monkeypatch.setattr(drawing, "_DRAWN", {})
    drawn: list[int] = []

    def scaled(self: Skeleton, graph: ir.Graph) -> dict[str, ComputedWeight]:
        found = take_out(self, graph)
        name = next(name for name, weight in found.items() if weight.transposed)
        graph.initializers[name].const_value = ir.tensor(1.5 * found.pop(name).matrix().T, name=name)
        drawn.append(1)
        return found

    monkeypatch.setattr(Skeleton, "take_out", scaled)
    target.export(case.base, [(case.adapter, 1.0)], tmp_path / "out", mode="merged", weights="fp32")
    assert drawn and exported.files(tmp_path / "out") == exported.files(case.out)


@pytest.mark.parametrize("name", ["bert", "vit", "whisper encoder"])
def test_a_branch_agrees_with_peft_with_and_without_its_adapter(name: str, make: Make) -> None:
    case = make(name, "branch", "fp32")
    feeds = case.feeds(3, 5)
    assert case.error(feeds) < 1e-5
    assert case.error(feeds, active=False) < 1e-5


def test_int8_weights_and_embeddings_are_near_and_small(make: Make) -> None:
    case, exact = make("bert", "merged", "int8"), make("bert", "merged", "fp32")
    feeds = case.feeds(3, 12)
    truth = case.truth(feeds)
    cosine = (case.run(feeds) * truth).sum(-1)
    cosine /= np.linalg.norm(case.run(feeds), axis=-1) * np.linalg.norm(truth, axis=-1)
    assert cosine.min() > 0.999
    sizes = [(one.out / "onnx" / "model.onnx_data").stat().st_size for one in (case, exact)]
    assert sizes[0] < 0.6 * sizes[1]  # tensors this small are half padding to a page
    operators = {node.op_type for node in onnx.load(case.out / "onnx" / "model.onnx").graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= operators


@pytest.mark.parametrize("name", ["roberta", "distilbert", "vit"])
def test_int8_activations_are_near(name: str, make: Make) -> None:
    case = make(name, "merged", "int8", "dynamic")
    assert case.error(case.feeds(3, 12)) < 0.05
    operators = {node.op_type for node in onnx.load(case.out / "onnx" / "model.onnx").graph.node}
    assert "MatMulInteger" in operators and "MatMulNBits" not in operators


def test_calibrating_a_model_of_images_on_text_is_refused_in_one_sentence(make: Make, tmp_path: Path) -> None:
    case, options = make("vit", "merged", "fp32"), {"activations": "static"}
    asked: Any = {"out": tmp_path / "out", "weights": "int8"}
    with pytest.raises(TargetError, match="takes pixel_values, which text can't be") as caught:
        target.export(case.base, [(case.adapter, 1.0)], **asked, options=options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match=r"on text, and ViT\w+ takes pixel_values; choose --method"):
        target.export(case.base, [(case.adapter, 1.0)], **asked, rounding=Rounding("gptq"))


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("bert", ["input_ids", "attention_mask", "token_type_ids"], ["last_hidden_state", "pooler_output"]),
        ("roberta", ["input_ids", "attention_mask"], ["last_hidden_state", "pooler_output"]),
        ("distilbert", ["input_ids", "attention_mask"], ["logits"]),
        ("vit", ["pixel_values"], ["logits"]),
        ("whisper", ["input_features"], ["logits"]),
        ("whole whisper", ["input_features"], ["last_hidden_state"]),
    ],
)
def test_names_and_axes_are_what_consumers_expect(
    name: str, inputs: list[str], outputs: list[str], make: Make
) -> None:
    case = make(name, "merged", "fp32")
    assert [value.name for value in case.session.get_inputs()] == inputs
    assert [value.name for value in case.session.get_outputs()] == outputs
    sound = ["batch_size", 16, 64]
    axes = {"vit": ["batch_size", 3, 16, 16], "whisper": sound, "whole whisper": sound}.get(
        name, ["batch_size", "sequence_length"]
    )
    assert all(value.shape == axes for value in case.session.get_inputs())
    config = json.loads((case.out / "config.json").read_text())
    assert config["architectures"] == [MODELS[name].model]


@pytest.mark.parametrize(
    ("name", "mode", "weights"),
    [
        ("bert", "merged", "fp32"),
        ("bert", "branch", "fp32"),
        ("bert", "merged", "int8"),
        ("whisper encoder", "branch", "fp32"),
    ],
)
def test_the_graph_is_sound_and_the_manifest_true(name: str, mode: str, weights: str, make: Make) -> None:
    case = make(name, mode, weights)
    assert exported.check(case.out, case.feeds(3, 5)) > 20
    manifest = bundle.verify(case.out, deep=True)
    assert (manifest.kind, manifest.mode, manifest.weights) == ("encoder", mode, weights)
    names = {
        node.name for node in onnx.load(case.out / "onnx" / "model.onnx", load_external_data=False).graph.node
    }
    last = "encoder.layer.1.output.dense" if name == "bert" else "layers.0.fc2"
    assert any(one.startswith(f"{last}/") for one in names)


def test_the_same_export_gives_the_same_bytes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("distilbert", "merged", "fp32")
    monkeypatch.setattr(drawing, "_DRAWN", {})  # so that it's drawn again
    target.export(case.base, [(case.adapter, 1.0)], tmp_path / "again", weights="fp32")
    assert bundle.read(tmp_path / "again").files == bundle.read(case.out).files


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_an_adapter_on_the_other_half_is_refused_in_one_sentence(
    mode: str, make: Make, tmp_path: Path
) -> None:
    case = make("whole whisper", "merged", "fp32")
    both = replace(case.family, targets=("q_proj",)).adapted(case.base, tmp_path / "adapter")
    with pytest.raises(
        TargetError, match=r"changes \S*decoder\S+, and Whisper\w+ is exported by its"
    ) as caught:
        target.export(case.base, [(both, 1.0)], tmp_path / "out", mode=mode)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_plan_of_half_a_model_names_that_half_alone(make: Make) -> None:
    plan = bundle.read(make("whole whisper", "merged", "fp32").out).plan
    assert plan is not None and isinstance(plan["steps"], list)
    assert plan["steps"] and all(".encoder." in str(step) for step in plan["steps"])


def test_what_is_neither_decoder_nor_encoder_is_refused_in_one_sentence(make: Make, tmp_path: Path) -> None:
    case = make("bert", "merged", "fp32")
    base = tmp_path / "base"
    base.mkdir()
    for path in case.base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["BertForPreTraining"]}))
    adapter = tmp_path / "adapter"
    shutil.copytree(case.adapter, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"auto_mapping": None}))
    with pytest.raises(TargetError, match="BertForPreTraining is neither a decoder nor an encoder") as caught:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
