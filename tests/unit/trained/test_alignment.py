"""A base whose layers have other names than the model in memory: every command finds an adapter's layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from tests import exported, tiny
from tests.conftest import Cli
from tests.families import FAMILIES, VOCABULARY, Family
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.errors import MismatchError
from vera_edge.exporting import onnx_adapter as packing
from vera_edge.exporting import target
from vera_edge.trained import alignment

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B")

_SIZES = {**FAMILIES["bert"].config, "num_hidden_layers": 1}
# prefix: what a hub's checkpoint leaves out of the model's names.
CASES: Mapping[str, tuple[Family, str]] = {
    "gpt2": (
        replace(FAMILIES["gpt2"], config={**FAMILIES["gpt2"].config, "vocab_size": 384}),
        "transformer.",
    ),
    "qwen3": (
        Family(
            "Qwen3ForCausalLM",
            ("q_proj", "v_proj", "down_proj"),
            {**FAMILIES["qwen3"].config, "vocab_size": 384, "head_dim": 16},
        ),
        "model.",
    ),
    "bert": (Family("BertForSequenceClassification", ("query", "value", "dense"), _SIZES), "bert."),
    # transformers itself renames the checkpoint's layers on loading
    "vit": (replace(FAMILIES["vit"], config={**FAMILIES["vit"].config, "num_hidden_layers": 1}), ""),
}


@dataclass
class Case:
    """A base as hubs have it, and two adapters with PEFT's names."""

    family: Family
    base: Path
    first: Path
    second: Path

    def feeds(self) -> dict[str, Any]:
        if "ViT" in self.family.model:
            return {
                "pixel_values": np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
            }
        ids = exported.tokens(12, VOCABULARY)[None]
        return {"input_ids": ids}

    def truth(self, adapter: Path) -> Any:
        """PEFT's first output."""
        import torch
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.family.load(self.base), adapter).eval()
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in self.feeds().items()})[0].numpy()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    (family, prefix), root = CASES[request.param], tmp_path_factory.mktemp(request.param)
    base = root / "base"
    family.make().save_pretrained(base)
    path = base / "model.safetensors"
    tensors = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    if family.model.endswith(("CausalLM", "LMHeadModel")):
        tiny.save_tokenizer(base)
    first = family.adapted(base, root / "first")
    second = shutil.copytree(first, root / "second")
    path = second / "adapter_model.safetensors"
    draw = np.random.default_rng(9)
    changed = {
        name: value * draw.uniform(0.2, 2, value.shape).astype(np.float32)
        for name, value in load_file(path).items()
    }
    save_file(changed, path, {"format": "pt"})
    return Case(family, base, first, second)


def run(folder: Path, adapter: Path, feeds: Mapping[str, Any]) -> Any:
    session, options = exported.session(folder), onnxruntime.RunOptions()
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(adapter))
    options.add_active_adapter(loaded)
    given = dict(feeds)
    if "input_ids" in feeds:
        names = {value.name for value in session.get_inputs()}
        if any("past" in name for name in names):
            given = exported.decoder_feeds(session, feeds["input_ids"])
        else:
            given = {
                "input_ids": feeds["input_ids"],
                "attention_mask": np.ones_like(feeds["input_ids"]),
                "token_type_ids": np.zeros_like(feeds["input_ids"]),
            }
            given = {name: value for name, value in given.items() if name in names}
    return session.run(None, given, options)[0]


@pytest.fixture(scope="module")
def branch(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "GPT2" in case.family.model:
        pytest.skip("no exporter draws its graph")
    out = tmp_path_factory.mktemp("branch") / "bundle"
    target.export(case.base, [(case.first, 1.0)], out, mode="branch")
    return out


def test_an_adapter_is_packed_whatever_its_layers_are_called(
    case: Case, branch: Path, tmp_path: Path, cli: Cli
) -> None:
    packed = tmp_path / "second.onnx_adapter"
    result = cli("adapter", "pack", case.second, "--for", branch, "-o", packed)
    assert result.exit_code == 0, result.stderr
    expected = case.truth(case.second)
    assert exported.error(run(branch, packed, case.feeds()), expected) < 2e-4
    assert exported.error(case.truth(case.first), expected) > 0.01
    manifest = bundle.read(branch)
    names = set(Checkpoint.open(case.base).linears)
    assert manifest.trained_names and manifest.trained_names.keys() <= names
    trained = alignment.read(case.second, Checkpoint.open(case.base)).as_trained
    assert trained is not None and set(manifest.trained_names.values()) == set(trained.vectors) - names


def test_a_bundle_of_before_is_packed_for_by_its_names(case: Case, branch: Path, tmp_path: Path) -> None:
    """Where the manifest doesn't keep PEFT's names, a prefix or two swapped parts are still found."""
    if "ViT" in case.family.model:
        pytest.skip("its layers have no names of that kind")
    folder = shutil.copytree(branch, tmp_path / "b")
    path = folder / bundle.MANIFEST
    bundle.write(folder, bundle.change(bundle.read(folder), trained_names={}))
    text = json.loads(path.read_text())
    assert text["trained_names"] == {}
    packed = packing.pack_folder(case.second, folder, tmp_path / "x.onnx_adapter")
    assert (
        packed.path.read_bytes()
        == packing.pack_folder(case.second, branch, tmp_path / "y.onnx_adapter").path.read_bytes()
    )


def test_to_lora_has_the_names_that_peft_looks_for(case: Case, tmp_path: Path, cli: Cli) -> None:
    result = cli("adapter", "to-lora", case.second, "-o", tmp_path / "lora", "--base", case.base)
    assert result.exit_code == 0, result.stderr
    expected = case.truth(case.second)
    assert exported.error(case.truth(tmp_path / "lora"), expected) < 2e-4


def test_adapters_of_one_base_are_compared_layer_by_layer(case: Case, tmp_path: Path, cli: Cli) -> None:
    """One saved from the model with its head, one from the model without."""
    shown = json.loads(cli("adapter", "diff", case.first, case.second, "--json").stdout)
    assert len(shown["layers"]) > 1 and shown["facts"] == {}
    prefix = next((prefix for family, prefix in CASES.values() if family is case.family), "")
    if not prefix:
        return
    bare = shutil.copytree(case.second, tmp_path / "bare")
    path = bare / "adapter_model.safetensors"
    tensors = {name.replace(f"model.{prefix}", "model.", 1): value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    again = json.loads(cli("adapter", "diff", case.first, bare, "--json").stdout)
    assert list(again["layers"].values()) == list(shown["layers"].values()) and again["facts"] == {}


def adapter(*modules: str) -> Adapter:
    vectors = {module: LambdaVectors(np.ones(2, np.float32), np.ones(2, np.float32)) for module in modules}
    return Adapter(Path("x"), "x", None, 2, 0, vectors, None, {}, {}, {}, None, "")


def test_layers_that_only_one_adapter_has_are_told(tmp_path: Path, tiny_adapter: Path, cli: Cli) -> None:
    other = shutil.copytree(tiny_adapter, tmp_path / "other")
    path = other / "adapter_model.safetensors"
    tensors = {name.replace("layers.1.", "layers.2."): value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    found = json.loads(cli("adapter", "diff", tiny_adapter, other, "--json").stdout)["facts"]
    (old, new) = found["layers that only one has"]
    assert len(old) == len(new) == 7 and "layers.1." in old[0] and "layers.2." in new[0]


def test_names_that_match_in_no_one_way_stay() -> None:
    given = adapter("transformer.h.0.q")
    assert alignment.align_names(given, ["encoder.h.0.q", "decoder.h.0.q"], {}) is given
    assert list(alignment.align_names(given, ["h.0.q"], {}).vectors) == ["h.0.q"]
    renamed = alignment.align_names(
        adapter("a.layers.0.q_proj"), ["a.layer.0.query"], {"a.layer.0.query": "a.layers.0.q_proj"}
    )
    assert list(renamed.vectors) == ["a.layer.0.query"] and renamed.as_trained is not None
    assert alignment.trained_names(renamed) == {"a.layer.0.query": "a.layers.0.q_proj"}


def test_an_adapter_of_another_model_is_still_refused(
    branch: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"has no side-branch for|projection seed"):
        packing.pack_folder(tiny_adapter, branch, tmp_path / "x.onnx_adapter")
