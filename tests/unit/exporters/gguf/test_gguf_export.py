"""GGUF files read back: by the gguf package, by our own reader, and where it is installed by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from peft import LoraConfig

import vera_edge
from tests import families, peft_adapters, tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.errors import BundleError, PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.formats.gguf import GgufFolder
from vera_edge_gguf import EXPORTER, tensor_types

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
Trained = tuple[Path, Path]  # base, adapter


def with_tokenizer(name: str) -> families.Family:
    """A family with as many tokens as the tiny tokenizer has."""
    family = families.FAMILIES[name]
    ends = {"bos_token_id": 1, "eos_token_id": 2} if name == "gpt2" else {}
    return replace(family, config={**family.config, "vocab_size": tiny.VOCABULARY, **ends})


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target, also where the package was installed before it had this one."""
    found = target.find
    monkeypatch.setattr(target, "find", lambda name: EXPORTER if name == "gguf" else found(name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A family's tiny model and an adapter on it, made when first asked for."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Trained]()

    def get(name: str) -> Trained:
        if name not in made:
            family = with_tokenizer(name)
            base = tiny.save(family.make(), root / name / "base")
            made[name] = base, family.adapted(base, root / name / "adapter")
        return made[name]

    return get


def tensors(folder: Path) -> Mapping[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def values(tensor: Any) -> npt.NDArray[np.float32]:
    found = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    return found.reshape(tensor.shape[::-1])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_our_own_reader_finds_every_value_of_the_merged_model(
    name: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Names, shapes, the order of rows that rotary embeddings want, and values."""
    base, adapter = trained(name)
    vera_edge.merge(base, adapter, out=tmp_path / "merged", to="fp32")
    vera_edge.export(base, adapter, out=tmp_path / "gguf", target="gguf", weights="f32")
    merged, read = Checkpoint.open(tmp_path / "merged"), GgufFolder(tmp_path / "gguf" / "model.gguf")
    assert set(read) == set(merged.tensors)
    for tensor in read:
        assert np.array_equal(read.float32(tensor), merged.float32(tensor)), tensor


@pytest.fixture(scope="module")
def merged(
    trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The file of a family's model, merged in float32, made when first asked for."""
    root, made = tmp_path_factory.mktemp("merged"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            base, adapter = trained(name)
            found = vera_edge.export(base, adapter, out=root / name, target="gguf", weights="f32")
            made[name] = found.model
        return made[name]

    return get


# transformers takes no heads of their own size, softcapping or inner size from the files of these.
NOT_ALL_SETTINGS = ("qwen3", "gemma2", "gemma3", "gpt2")
TOKENS = np.random.default_rng(3).integers(3, tiny.VOCABULARY, 40)


def as_trained(base: Path, adapter: Path) -> npt.NDArray[np.float32]:
    from vera_edge.measuring.opened_reference import open_trained

    return open_trained(adapter, base).runner.logits(TOKENS)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_model_as_trained_out_of_the_file(
    name: str, trained: Callable[[str], Trained], merged: Callable[[str], Path]
) -> None:
    """By its own reader: names, the order of rows, norms, turned weights, and settings."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = trained(name)
    file, options = merged(name), dict[str, Any](dtype=torch.float32)
    if name in NOT_ALL_SETTINGS:
        options["config"] = AutoConfig.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).eval()
    with torch.inference_mode():
        found = model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    wanted = as_trained(base, adapter)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_the_model_as_trained_does(
    name: str, trained: Callable[[str], Trained], merged: Callable[[str], Path]
) -> None:
    """Keys and values are float16 there, and GELU is a table: no more than that."""
    pytest.importorskip("llama_cpp")
    from vera_edge.device.llama.runner import LlamaRunner

    wanted = as_trained(*trained(name))
    found = LlamaRunner(merged(name)).logits(TOKENS)
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_an_adapter_beside_its_base_is_swapped_in_llama_cpp(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from vera_edge.device.llama.runner import LlamaRunner
    from vera_edge.measuring.opened_reference import open_trained

    base, adapter = trained("llama")
    made = vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", mode="branch", weights="f32")
    reference = open_trained(adapter, base)
    assert reference.base is not None
    wanted, plain = reference.runner.logits(TOKENS), reference.base.logits(TOKENS)
    found = LlamaRunner(made.model, made.adapters["default"]).logits(TOKENS)
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()
    assert np.abs(LlamaRunner(made.model).logits(TOKENS) - plain).max() < 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("method", ["vera", "lora", "HRA"])
def test_the_factors_of_a_lora_give_the_adapters_delta(
    method: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Base plus alpha / r B' A' is the merged weight, rows in the order of llama.cpp on both sides."""
    base, adapter = trained("llama")
    if method == "lora":
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        options: dict[str, Any] = {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
        config = LoraConfig(target_modules=linears, task_type="CAUSAL_LM", lora_alpha=6, **options)
        adapter = peft_adapters.save(base, tmp_path / "lora", config)
    if method == "HRA":  # whose change is of low rank, and depends on the base
        adapter = peft_adapters.save_method(base, tmp_path / "hra", method)
    merged = vera_edge.export(base, adapter, out=tmp_path / "merged", target="gguf", weights="f32")
    branch = vera_edge.export(
        base, adapter, out=tmp_path / "branch", target="gguf", mode="branch", weights="f32"
    )
    reader = gguf.GGUFReader(branch.adapters["default"])
    factors = {tensor.name: values(tensor) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    own, whole = tensors(branch.folder), tensors(merged.folder)
    adapted = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert len(adapted) == (8 if method == "HRA" else 14)
    for name in adapted:
        lower = factors[f"{name}.lora_a"]
        delta = alpha / len(lower) * factors[f"{name}.lora_b"] @ lower
        assert np.allclose(values(own[name]) + delta, values(whole[name]), atol=2e-6), name
    assert np.array_equal(values(own["blk.0.attn_norm.weight"]), values(whole["blk.0.attn_norm.weight"]))


@pytest.mark.parametrize("method", ["LORA, use_dora", "IA3", "SHIRA"])
def test_an_adapter_that_no_lora_can_stand_for_is_refused(
    method: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    base, _ = trained("llama")
    adapter = peft_adapters.save_method(base, tmp_path / "adapter", method)
    with pytest.raises(TargetError, match="doesn't only add products of two thin matrices"):
        vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", mode="branch", weights="f32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_rounding_to_nearest_is_the_gguf_packages_own(
    weights: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    base, adapter = trained("llama")
    exact = vera_edge.export(base, adapter, out=tmp_path / "exact", target="gguf", weights="f32")
    made = vera_edge.export(
        base, adapter, out=tmp_path / "made", target="gguf", weights=weights, method="rtn"
    )
    wanted, kind = tensors(exact.folder), tensor_types.ggml_type(weights)
    for name, tensor in tensors(made.folder).items():
        if tensor.tensor_type == kind:
            own = gguf.quants.quantize(values(wanted[name]), kind)
            assert np.array_equal(np.array(tensor.data), own), name
    assert tensors(made.folder)["blk.0.attn_q.weight"].tensor_type == kind


@pytest.mark.parametrize("weights", ["q4_0", "q5_0", "iq4_nl"])
def test_compensated_rounding_loses_less_than_rounding_to_nearest(
    weights: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """Of the layer that reads the embedding, on the inputs that it is calibrated on."""
    base, adapter = trained("llama")
    (tmp_path / "text.txt").write_text(tiny.TEXT * 40)
    common: Any = {"target": "gguf", "weights": weights, "calibration": tmp_path / "text.txt"}
    near = vera_edge.export(base, adapter, out=tmp_path / "near", method="rtn", **common)
    good = vera_edge.export(base, adapter, out=tmp_path / "good", **common)
    first = "blk.0.attn_q.weight"
    assert tensors(good.folder)[first].tensor_type == tensor_types.ggml_type(weights)
    assert not np.array_equal(
        np.array(tensors(near.folder)[first].data), np.array(tensors(good.folder)[first].data)
    )
    assert any("rounded by gptq" in note for note in good.notes)


def test_rows_that_no_block_divides_fall_back_and_it_is_said(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    base, adapter = trained("llama")
    made = vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", weights="q8_0")
    assert tensors(made.folder)["blk.1.ffn_down.weight"].tensor_type.name == "F16"
    assert [note for note in made.notes if "2 layers are fp16" in note and "mlp.down_proj: 48" in note]
    assert {step.result for step in made.plan.steps} == {"q8_0", "fp16", "fp32"}


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemmas_norms_are_stored_as_they_are_used(
    name: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    base, adapter = trained(name)
    made = vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", weights="f32")
    source = Checkpoint.open(base).float32("model.layers.0.input_layernorm.weight")
    assert np.array_equal(values(tensors(made.folder)["blk.0.attn_norm.weight"]), source + np.float32(1))


def test_the_folder_is_a_bundle_that_says_what_runs_it(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    base, adapter = trained("llama")
    made = vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", weights="q8_0")
    manifest = bundle.verify(made.folder)
    assert (manifest.model, manifest.weights, manifest.kind) == ("model.gguf", "q8_0", "decoder")
    with pytest.raises(BundleError, match=r"is for llama\.cpp; run it with: llama-server -m .*model\.gguf"):
        vera_edge.open_bundle(made.folder)


def test_two_exports_are_the_same_bytes(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    base, adapter = trained("qwen3")
    made = [
        vera_edge.export(base, adapter, out=tmp_path / name, target="gguf", weights="q8_0") for name in "ab"
    ]
    assert bundle.read(made[0].folder).digest == bundle.read(made[1].folder).digest


def test_what_llama_cpp_has_not_is_refused_in_a_sentence(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    base, adapter = trained("llama")
    with pytest.raises(PlanError, match="the target gguf stores no nf4 weights; choose from fp32, f32"):
        vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", weights="nf4")
    with pytest.raises(PlanError, match="the target onnx stores no q4_0 weights; choose from same"):
        vera_edge.export(base, adapter, out=tmp_path / "out", weights="q4_0")
    with pytest.raises(PlanError, match="takes no option 'accuracy_level'"):
        vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf", accuracy_level=4)
    with pytest.raises(PlanError, match="the head can't be stored as 'q8_0'; choose from fp32, fp16, int8"):
        vera_edge.export(base, adapter, out=tmp_path / "out", weights="fp32", head="q8_0")
    base, adapter = trained("gpt-neox")
    with pytest.raises(TargetError, match="GPTNeoXForCausalLM isn't written as GGUF"):
        vera_edge.export(base, adapter, out=tmp_path / "out", target="gguf")
    assert not (tmp_path / "out").exists()
