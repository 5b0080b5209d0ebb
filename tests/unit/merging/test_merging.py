"""Merging against PEFT's own unmerged forward and bitsandbytes' own values."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests import tiny
from vera_edge import formats
from vera_edge import merging as merge
from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter, WeightedAdapter
from vera_edge.adapters.projection import Projections, ProjectionSpec, regenerate
from vera_edge.adapters.vera import LambdaVectors, vectors_of
from vera_edge.arrays import Bytes, Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError, CheckpointError, MismatchError, OutputError, PlanError
from vera_edge.plans import plan as plans
from vera_edge.reference.model import load_dense
from vera_edge.rounding.weight_rounding import merge_to_folder
from vera_edge.storage import byte_ranges
from vera_edge.trained.trained_model import TrainedModel

TOKENS = torch.arange(3, 63)[None] * 5 % 384
FORMATS = ["fp32", "sharded", "fp16", "bf16", "nf4", "fp4", "int8"]


def logits(model: Any) -> Float32:
    with torch.no_grad():
        found: Float32 = model.eval()(input_ids=TOKENS).logits.float().numpy()
    return found


def close(mine: Float32, truth: Float32) -> bool:
    """Within 1e-4 of the logits' scale."""
    return bool(np.abs(mine - truth).max() < 1e-4 * np.abs(truth).max())


def true_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every quantized weight of a folder, dequantized in float32 by bitsandbytes' portable kernels."""
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            yield module, bnb.int8_vectorwise_dequant(state[f"{module}.weight"], state[name])
        if ".quant_state." in name:
            module = name.split(".weight.quant_state")[0]
            parts = {key: state[key] for key in state if key.startswith(f"{module}.weight.")}
            quant = bnb.QuantState.from_dict(
                {key.removeprefix(f"{module}.weight."): value for key, value in parts.items()},
                torch.device("cpu"),
            )
            absmax = quant.absmax
            if quant.nested:
                absmax = bnb.dequantize_blockwise(quant.absmax, quant.state2) + quant.offset
            packed = state[f"{module}.weight"].view(torch.uint8).reshape(-1)
            facts = (quant.code, quant.blocksize, quant.shape, torch.float32)
            yield module, _dequantize_4bit_compute.__wrapped__(packed, absmax, *facts)


def dense(folder: Path, original: Path) -> Any:
    """The base in `folder` as a float32 model: `original`'s architecture with the true weights."""
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    model = tiny.load(original if quantized else folder)
    for module, weight in true_weights(folder) if quantized else ():
        layer = model.get_submodule(module)
        turned = type(layer).__name__ == "Conv1D"
        layer.weight.data = weight.T.contiguous() if turned else weight
    return model


def truth(folder: Path, original: Path, adapter: Path) -> Float32:
    """PEFT's unmerged forward on the true base."""
    return logits(PeftModel.from_pretrained(dense(folder, original), adapter))


@pytest.mark.parametrize("source", FORMATS)
def test_merged_float32_equals_pefts_unmerged_forward(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, source: str
) -> None:
    """The adapter is made on that very base, its projections saved, as rounded as PEFT left them."""
    base = getattr(tiny_llama, source)
    options = {"dtype": torch.bfloat16} if source == "bf16" else {}
    adapter = tiny.make_adapter(base, tmp_path / "adapter", save_projection=True, load_options=options)
    report = merge.to_folder(base, [(adapter, 1.0)], tmp_path / "out", "fp32")
    expected = truth(base, tiny_llama.fp32, adapter)
    assert close(logits(tiny.load(tmp_path / "out")), expected)
    assert not close(logits(dense(base, tiny_llama.fp32)), expected)  # the adapter does something
    assert report.survival.retained == pytest.approx(1.0)
    assert report.warning is None
    assert len(report.layers) == 14


@pytest.mark.parametrize("to", ["same", "fp32", "bf16", "fp16", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("source", ["fp32", "nf4", "int8"])
def test_every_target_loads_with_transformers(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, source: str, to: str
) -> None:
    base, out = getattr(tiny_llama, source), tmp_path / "out"
    report = merge.to_folder(base, [(tiny_adapter, 1.0)], out, to)
    expected = source if to == "same" else to
    checkpoint = Checkpoint.open(out)
    assert {linear.format for linear in checkpoint.linears.values()} == {expected}
    assert report.results == {expected: 14}
    model = tiny.load(out, dtype="auto")
    kind = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt"}.get(expected, "Linear")
    for module in checkpoint.linears:
        assert type(model.get_submodule(module)).__name__ == kind
    assert type(model.lm_head).__name__ == "Linear"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if kind != "Linear4bit":  # whose CPU kernel can't run rows of 160 values in blocks of 64
        assert np.isfinite(logits(model)).all()
    model_as_trained = trained(Checkpoint.open(base), tiny_adapter)
    for module in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"):
        exact = merge.merged_weight(model_as_trained, module)
        assert np.abs(checkpoint.dequantize(module) - exact).max() <= 0.2 * np.abs(exact).max()
        held = model.get_submodule(module).weight.data.view(torch.uint8)
        assert held.numpy().tobytes() == checkpoint.tensors.read(f"{module}.weight").data.tobytes()


def tiny_projections() -> Projections:
    return regenerate(ProjectionSpec(31, 8, 160, 160))


def trained(base: Checkpoint, adapter: Path) -> TrainedModel:
    return TrainedModel(base, (WeightedAdapter(adapters.read(adapter), 1.0),), tiny_projections())


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_quantized_values_are_those_bitsandbytes_would_store(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, to: str
) -> None:
    base = Checkpoint.open(tiny_llama.fp32)
    merge.to_folder(tiny_llama.fp32, [(tiny_adapter, 1.0)], tmp_path / "out", to)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for module in base.linears:
        exact = torch.from_numpy(merge.merged_weight(trained(base, tiny_adapter), module))
        if to == "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(exact)
            assert torch.equal(state[f"{module}.SCB"], scales)
        else:
            codes, quant = bnb.quantize_4bit(exact, quant_type=to)
            assert torch.equal(state[f"{module}.weight.absmax"], quant.absmax)
        assert torch.equal(state[f"{module}.weight"], codes)


@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
def test_conv1d_models(tiny_gpt2: Path, tmp_path: Path, kind: str) -> None:
    options = {"nf4": tiny.four_bit("nf4"), "int8": {"load_in_8bit": True}}
    base = tiny_gpt2 if kind == "fp32" else tiny.quantize(tiny_gpt2, tmp_path / "base", **options[kind])
    adapter = tiny.make_adapter(
        base,
        tmp_path / "adapter",
        targets=tiny.GPT2_LINEARS,
        fan_in_fan_out=kind == "fp32",
        save_projection=True,
    )
    # A config that says otherwise must not turn the weights: PEFT's flag is that of the last layer it saw.
    settings_file = adapter / "adapter_config.json"
    facts = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(facts | {"fan_in_fan_out": kind != "fp32"}))
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "out", "fp32")
    settings_file.write_text(json.dumps(facts | {"fan_in_fan_out": True}))
    assert close(logits(tiny.load(tmp_path / "out")), truth(base, tiny_gpt2, adapter))
    # The reference lays a quantized base's weights out as the unquantized model has them, too.
    assert close(logits(load_dense(Checkpoint.open(base))), logits(dense(base, tiny_gpt2)))
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "int8", "int8")
    model = tiny.load(tmp_path / "int8")
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Linear8bitLt"
    assert tuple(model.transformer.h[0].mlp.c_fc.weight.shape) == (160, 64)
    assert np.isfinite(logits(model)).all()


def test_layers_without_an_adapter_keep_their_bytes(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(
        tiny_llama.nf4, tmp_path / "adapter", targets=["q_proj"], layers_to_transform=[1]
    )
    merge.to_folder(tiny_llama.nf4, [(adapter, 1.0)], tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama.nf4, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
    assert changed
    assert {name.split(".weight")[0] for name in changed} == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("source", ["nf4", "fp4", "int8", "bf16"])
def test_an_untrained_adapter_changes_no_byte(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, source: str
) -> None:
    """lambda_b starts as zeros; requantizing double-quantized scales for nothing would move them."""
    base = getattr(tiny_llama, source)
    adapter = tiny.make_adapter(base, tmp_path / "adapter", strength=0.0)
    report = merge.to_folder(base, [(adapter, 1.0)], tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").digest == Checkpoint.open(base).digest
    assert len(report.unchanged) == 14
    assert report.survival.retained is None
    assert report.warning is None


def test_layers_that_keep_4_bits_stored_under_a_float_dtype(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """What is copied is refused when it holds NaN; packed codes may look like it."""
    options = tiny.four_bit("nf4", bnb_4bit_quant_storage="bfloat16")
    base = tiny.quantize(tiny_llama.fp32, tmp_path / "base", **options)
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter", targets=("q_proj",))
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    kept = [name for name in before if "q_proj" not in name]
    assert any(torch.isnan(before[name]).any() for name in kept)
    for name in kept:
        assert torch.equal(*(state[name].reshape(-1).view(torch.uint8) for state in (before, after))), name


def test_several_adapters_add_up(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    first = tiny.make_adapter(tiny_llama.nf4, tmp_path / "first", vectors_seed=1)
    second = tiny.make_adapter(tiny_llama.nf4, tmp_path / "second", vectors_seed=2)
    pairs = [(first, 0.3), (second, -1.5)]
    merge.to_folder(tiny_llama.nf4, pairs, tmp_path / "out", "fp32")
    merged = Checkpoint.open(tmp_path / "out")
    model = PeftModel.from_pretrained(dense(tiny_llama.nf4, tiny_llama.fp32), first, adapter_name="one")
    model.load_adapter(second, adapter_name="two")
    for module in merged.linears:
        layer = model.base_model.model.get_submodule(module)
        deltas = 0.3 * layer.get_delta_weight("one") - 1.5 * layer.get_delta_weight("two")
        expected = (layer.get_base_layer().weight + deltas).detach().numpy()
        assert np.abs(merged.dequantize(module) - expected).max() < 1e-6 * np.abs(expected).max()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "first, weight 0.3" in card
    assert "second, weight -1.5" in card


def test_trained_biases_and_whole_modules_are_put_in_place(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = tiny.load(tiny_gpt2)
    torch.manual_seed(3)
    adapter = tiny.make_adapter(
        tiny_gpt2,
        tmp_path / "adapter",
        targets=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        bias="vera_only",
        modules_to_save=["ln_f"],
        save_projection=True,
    )
    state = load_file(adapter / "adapter_model.safetensors")
    drawn = {
        name: torch.randn_like(value)
        for name, value in state.items()
        if name.endswith("bias") or "ln_f" in name
    }
    assert len(drawn) == 4 + 2
    save_file(state | drawn, adapter / "adapter_model.safetensors", {"format": "pt"})
    expected = logits(PeftModel.from_pretrained(model, adapter))
    merge.to_folder(tiny_gpt2, [(adapter, 1.0)], tmp_path / "out", "fp32")
    assert close(logits(tiny.load(tmp_path / "out")), expected)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_untied_when_only_one_is_replaced(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, saved: str
) -> None:
    """PEFT trains its own copy of one of the two, and the other keeps the base's values."""
    adapter = tiny.make_adapter(
        tiny_llama.fp32, tmp_path / "adapter", modules_to_save=[saved], save_projection=True
    )
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    names = [name for name in state if saved in name]
    assert len(names) == 1
    state[names[0]] = torch.randn_like(state[names[0]])
    save_file(state, file, {"format": "pt"})
    expected = logits(PeftModel.from_pretrained(tiny.load(tiny_llama.fp32), adapter))
    merge.to_folder(tiny_llama.fp32, [(adapter, 1.0)], tmp_path / "out", "fp32")
    model = tiny.load(tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    assert close(logits(model), expected)


def test_the_report_measures_what_its_formulas_say(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = Checkpoint.open(tiny_llama.nf4)
    report = merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    sums = np.zeros(3)
    for layer in report.layers:
        weight = base.dequantize(layer.module).astype(np.float64)
        merged = merge.merged_weight(trained(base, tiny_adapter), layer.module)
        delta, rounded = merged - weight, out.dequantize(layer.module)
        squares = (delta**2).sum()
        kept, error = ((rounded - weight) * delta).sum(), ((rounded - merged) ** 2).sum()
        assert layer.survival.retained == pytest.approx(kept / squares, rel=1e-3)
        assert layer.survival.noise == pytest.approx(np.sqrt(error / squares), rel=1e-3)
        assert layer.survival.size == pytest.approx(np.sqrt(squares / (weight**2).sum()), rel=1e-3)
        sums += squares, kept, error
    assert report.survival.retained == pytest.approx(sums[1] / sums[0], rel=1e-3)
    assert report.survival.noise == pytest.approx(np.sqrt(sums[2] / sums[0]), rel=1e-3)


def test_a_drowned_adapter_is_told_and_a_better_format_named(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tiny_llama.nf4, tmp_path / "adapter", strength=0.03)
    report = merge.to_folder(tiny_llama.nf4, [(adapter, 1.0)], tmp_path / "same")
    assert report.survival.retained is not None
    assert report.survival.retained < 0.3
    assert report.warning is not None
    assert "drowned by rounding to nf4" in report.warning
    named = report.warning.split("--to ")[1].split()[0]
    better = merge.to_folder(tiny_llama.nf4, [(adapter, 1.0)], tmp_path / "better", named)
    assert better.warning is None
    assert better.survival.noise is not None
    assert better.survival.noise < 0.5
    card = (tmp_path / "same" / "README.md").read_text()
    assert report.warning in card


def test_the_folder_is_an_ordinary_one(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama.nf4, tmp_path / "my <base> | *x*"))
    for name in ("modeling_own.py", "pytorch_model.bin", "training_args.bin", ".hidden", "optimizer.pt"):
        (base / name).write_text("import os")
    (base / "LICENSE").write_text("Apache")
    (base / "generation_config.json").write_text('{"max_new_tokens": 3}')
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_own.Own"}}
    (base / "config.json").write_text(json.dumps(config))
    merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vera_edge_merge.json",
    }
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged == {key: value for key, value in config.items() if key != "auto_map"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# my base  x, merged with adapter" in card
    assert Checkpoint.open(base).digest in card
    record = json.loads((tmp_path / "out" / "vera_edge_merge.json").read_text())
    assert record["plan"]["weights"] == "same"
    assert record["report"]["merged_layers"] == 14
    assert str(tmp_path) not in json.dumps(record) + card
    again = merge.prepare(tmp_path / "out", [(tiny_adapter, 1.0)])
    assert any("by merging this very adapter" in note for note in again.model.notes)
    (tmp_path / "out" / "vera_edge_merge.json").write_text("[")
    again = merge.prepare(tmp_path / "out", [(tiny_adapter, 1.0)])
    assert not any("by merging this very adapter" in note for note in again.model.notes)


@pytest.mark.parametrize("limit", [1 << 40, 50_000])
def test_the_same_inputs_give_the_same_bytes(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, limit: int
) -> None:
    ready = merge.prepare(tiny_llama.sharded, [(tiny_adapter, 1.0)], "nf4", {"double_quant": True})
    for name in ("one", "two"):
        merge.write(ready.plan, ready.model, tmp_path / name, max_shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert ("model.safetensors.index.json" in files) is (limit == 50_000)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert tiny.load(tmp_path / "one") is not None


def test_options_reach_the_format(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    options = {"blocksize": 128, "double_quant": True}
    merge.to_folder(tiny_llama.bf16, [(tiny_adapter, 1.0)], tmp_path / "out", "nf4", options)
    linear = next(iter(Checkpoint.open(tmp_path / "out").linears.values()))
    assert linear.params["blocksize"] == 128
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is True
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def synthetic(folder: Path, out: int, inside: int, layers: int = 1) -> Checkpoint:
    rng = np.random.default_rng(out * 1000 + inside)
    tensors = {
        f"layers.{number}.fc.weight": torch.from_numpy(rng.standard_normal((out, inside)).astype(np.float32))
        for number in range(layers)
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "made"}')
    return Checkpoint.open(folder)


def made_adapter(path: Path, modules: list[str], out: int, rank: int, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    vectors = {
        module: LambdaVectors(
            rng.standard_normal(out).astype(np.float32) * np.float32(0.1),
            rng.standard_normal(rank).astype(np.float32),
        )
        for module in modules
    }
    return Adapter(path, "made", None, rank, 7, vectors, None, {}, {}, {}, None, "0" * 64)


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 40),
    inside=st.integers(1, 40),
    rank=st.integers(1, 12),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=3),
)
def test_the_merged_forward_is_the_branch_forward(
    tmp_path_factory: pytest.TempPathFactory, out: int, inside: int, rank: int, weights: list[float]
) -> None:
    """h = W x + sum_i w_i diag(b_i) B diag(d_i) A x, for projections larger than the layer too."""
    checkpoint = synthetic(tmp_path_factory.mktemp("made"), out, inside)
    module = "layers.0.fc"
    pairs = tuple(
        WeightedAdapter(made_adapter(Path("a"), [module], out, rank, n), weight)
        for n, weight in enumerate(weights)
    )
    projections = regenerate(ProjectionSpec(3, rank, inside + 5, out + 3))
    x = np.random.default_rng(1).standard_normal((inside, 4))
    branch = checkpoint.dequantize(module).astype(np.float64) @ x
    for adapter, weight in pairs:
        pair = vectors_of(adapter)[module]
        inner = pair.lambda_d[:, None] * (projections.a[:, :inside].astype(np.float64) @ x)
        branch += weight * pair.lambda_b[:, None] * (projections.b[:out] @ inner)
    merged = merge.merged_weight(TrainedModel(checkpoint, pairs, projections), module) @ x
    assert np.abs(merged - branch).max() <= 1e-5 * max(1.0, np.abs(branch).max())


@pytest.mark.parametrize("to", ["same", "bf16"])
def test_the_base_is_read_once(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Its digest is of the very bytes that were merged."""
    read: dict[str, int] = {}

    def counted(path: Path, start: int, sizes: Iterable[int], what: str) -> Iterator[Bytes]:
        for data in once(path, start, sizes, what):
            name = what.removeprefix("tensor ")
            read[name] = read.get(name, 0) + data.size
            yield data

    ready = merge.prepare(tiny_llama.bf16, [(tiny_adapter, 1.0)], to, projection_rounding="float32")
    once = byte_ranges.read
    monkeypatch.setattr(byte_ranges, "read", counted)
    report = merge.perform(ready, tmp_path / "out")
    assert report.warning is None, "a warning tries some layers again"
    assert read == {name: info.nbytes for name, info in ready.model.checkpoint.tensors.items()}
    assert report.base_digest == Checkpoint.open(tiny_llama.bf16).digest


def test_no_more_than_one_tensor_is_in_memory(tmp_path: Path) -> None:
    """6 layers of 16 MiB: a layer as stored, its merged values, its packed result, and small pieces."""
    checkpoint = synthetic(tmp_path / "base", 2048, 2048, layers=6)
    adapter = made_adapter(Path("a"), list(checkpoint.linears), 2048, 4)
    projections = regenerate(ProjectionSpec(3, 4, 2048, 2048))
    model = TrainedModel(checkpoint, (WeightedAdapter(adapter, 1.0),), projections)
    plan = plans.make(checkpoint, model.adapters, weights="nf4", projections=projections)
    tracemalloc.start()
    try:
        merge.write(plan, model, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * (16 << 20)


class TestRefused:
    """One sentence, and nothing left behind."""

    def nothing_in(self, folder: Path) -> bool:
        return not [path for path in folder.iterdir() if path.name.startswith((".out", "out"))]

    def test_an_output_that_exists(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
        with pytest.raises(OutputError, match="exists and isn't empty"):
            merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out")
        assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
        merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out", force=True)
        assert not (tmp_path / "out" / "mine.txt").exists()

    @pytest.mark.parametrize("to_input", [True, False])
    def test_an_output_that_would_replace_an_input(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, to_input: bool
    ) -> None:
        base = Path(shutil.copytree(tiny_llama.nf4, tmp_path / "both" / "base"))
        adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "both" / "adapter"))
        ready, out = merge.prepare(base, [(adapter, 1.0)], "fp32"), adapter if to_input else adapter.parent
        with pytest.raises(OutputError, match="would delete"):
            merge.perform(ready, out, force=True)
        with pytest.raises(OutputError, match="would delete"):
            merge_to_folder(ready, out, force=True)
        assert (adapter / "adapter_config.json").is_file() and (base / "config.json").is_file()

    def test_options_that_would_be_passed_over(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        for to, options, message in (
            ("nf4", {"blocksize": 128}, "stored as nf4 with blocksize 64 and keeps that"),
            ("nf4", {"double_quant": False}, "with double_quant True and keeps that"),
            ("nf4", {"blocksize": 48}, "reads no 4-bit block size 48"),
            ("nf4", {"blocksize": -1}, "reads no 4-bit block size -1"),
            ("fp32", {"blocksize": 64}, "fp32 takes no option 'blocksize'"),
        ):
            with pytest.raises(PlanError, match=message):
                merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out", to, options)
        own = {"blocksize": 64, "double_quant": True}
        merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out", "nf4", own)

    @pytest.mark.filterwarnings("error:overflow:RuntimeWarning")
    def test_a_delta_beyond_float32(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        large = tiny.make_adapter(tiny_llama.nf4, tmp_path / "large", strength=100)
        with pytest.raises(AdapterError, match="beyond float32"):
            merge.to_folder(tiny_llama.nf4, [(large, 1e38)], tmp_path / "out", "fp32")
        assert self.nothing_in(tmp_path)
        report = merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1e37)], tmp_path / "out", "fp32")
        assert report.survival.retained == pytest.approx(1)  # its squares are beyond float32, it isn't

    def test_an_unknown_format(self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="no weight format is called 'int3'"):
            merge.to_folder(tiny_llama.nf4, [(tiny_adapter, 1.0)], tmp_path / "out", "int3")
        with pytest.raises(PlanError, match="at least one adapter"):
            merge.to_folder(tiny_llama.nf4, [], tmp_path / "out")

    def test_adapters_of_other_projections(self, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
        first = tiny.make_adapter(tiny_llama.nf4, tmp_path / "first")
        second = tiny.make_adapter(tiny_llama.nf4, tmp_path / "second", seed=32)
        third = tiny.make_adapter(tiny_llama.nf4, tmp_path / "third", targets=["q_proj"])
        with pytest.raises(MismatchError, match=r"differ in their projection seed \(31 and 32\)"):
            merge.to_folder(tiny_llama.nf4, [(first, 1.0), (second, 1.0)], tmp_path / "out")
        with pytest.raises(MismatchError, match=r"differ in in_max \(160 and 64\), out_max"):
            merge.to_folder(tiny_llama.nf4, [(first, 1.0), (third, 1.0)], tmp_path / "out")

    def test_a_plan_for_other_inputs(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        ready = merge.prepare(tiny_llama.nf4, [(tiny_adapter, 1.0)])
        rest = (ready.model, tmp_path / "out")
        with pytest.raises(MismatchError, match="another base"):
            merge.write(dataclasses.replace(ready.plan, base="0"), *rest)
        with pytest.raises(MismatchError, match="other adapters or weights"):
            merge.write(dataclasses.replace(ready.plan, adapters=()), *rest)
        with pytest.raises(PlanError, match="side-branch"):
            merge.write(dataclasses.replace(ready.plan, mode="branch"), *rest)
        other = {**(ready.plan.projection or {}), "digest": "0"}
        with pytest.raises(MismatchError, match="other projections"):
            merge.write(dataclasses.replace(ready.plan, projection=other), *rest)
        assert self.nothing_in(tmp_path)

    def test_nan_in_a_weight(self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
        base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
        state = load_file(base / "model.safetensors")
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(state, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"weight of model\.layers\.1\.mlp\.up_proj holds NaN"):
            merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out", "nf4")
        assert self.nothing_in(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("to", ["fp32", "same"])
    def test_nan_in_what_is_copied(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, dtype: torch.dtype, to: str
    ) -> None:
        base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
        state = load_file(base / "model.safetensors")
        state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
        state["model.norm.weight"][3] = float("nan")
        save_file(state, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .*model\.safetensors holds NaN"):
            merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out", to)
        assert self.nothing_in(tmp_path)
        state["model.norm.weight"][3] = float("-inf")
        save_file(state, base / "model.safetensors", {"format": "pt"})
        merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out", to)

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    def test_values_beyond_fp16(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, name: str
    ) -> None:
        base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
        state = load_file(base / "model.safetensors")
        state[name].view(-1)[0] = 1e6
        save_file(state, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(PlanError, match=r"beyond fp16's largest"):
            merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out", "fp16")
        assert self.nothing_in(tmp_path)
        merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out", "bf16")

    def test_a_tokenizer_that_is_a_link_out(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        base = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
        (tmp_path / "secret").write_text("secret")
        (base / "tokenizer.json").unlink()
        (base / "tokenizer.json").symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json leads out of"):
            merge.to_folder(base, [(tiny_adapter, 1.0)], tmp_path / "out")
        assert self.nothing_in(tmp_path)

    @pytest.mark.parametrize("limit", [100, 200_000])
    def test_a_disk_that_takes_no_more(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, limit: int
    ) -> None:
        """The kernel's own limit on a file's size stands for the end of the disk."""
        code = (
            "import resource, sys; from pathlib import Path; from vera_edge import merging as merge, errors\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "base, adapter, out = map(Path, sys.argv[1:])\n"
            "try:\n    merge.to_folder(base, [(adapter, 1.0)], out, 'fp32')\n"
            "except errors.OutputError as error:\n    sys.exit(f'OutputError: {error}')\n"
        )
        words = [str(tiny_llama.nf4), str(tiny_adapter), str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith("OutputError: "), done.stderr
        assert "file size" in done.stderr
        assert self.nothing_in(tmp_path)


def test_formats_registry_names_what_merge_takes() -> None:
    assert {"fp32", "fp16", "bf16", "nf4", "fp4", "int8"} <= set(formats.FORMATS)
