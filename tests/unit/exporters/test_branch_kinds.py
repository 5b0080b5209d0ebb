"""Adapters of several methods beside one untouched base: each is PEFT's unmerged forward in ONNX Runtime."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch

from tests import peft_adapters, tiny
from tests.conftest import Cli
from tests.unit.merging.test_methods import BRANCH
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.reading import read
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import target
from vera_edge.exporting.branch_form import forms_of
from vera_edge.exporting.exact_pair import pair_of
from vera_edge.reference.model import load_dense

TOKENS = peft_adapters.TOKENS[0].numpy()
# Method -> PEFT's config class and settings; the first is the bundle's default, the last are of low rank.
FEW = {"target_modules": ["q_proj", "down_proj"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA": (
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"]},
    ),
    "VERA": ("VeraConfig", {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "LORA, use_dora": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "IA3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ADALORA": ("AdaLoraConfig", {"init_r": 3, "total_step": 10, "target_modules": ["v_proj"]}),
    "DEFT": ("DeftConfig", FEW),
    "DELORA": ("DeloraConfig", {"r": 4, **FEW}),
    "GRALORA": ("GraloraConfig", {"r": 4, "gralora_k": 2, **FEW}),
    "HRA": ("HRAConfig", {"r": 4, **FEW}),
    "LOHA": ("LoHaConfig", {"r": 3, **FEW}),
    "MISS": ("MissConfig", {"r": 8, **FEW}),
    "PVERA": ("PveraConfig", {"r": 8, "save_projection": True, **FEW}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 16, "vector_length": 16, **FEW}),
}
SOME = ("LORA", "VERA", "LORA, use_dora", "IA3", "HRA")


def named(method: str) -> str:
    return "default" if method == "LORA" else method.replace(", ", "-")


@pytest.fixture(scope="module")
def adapters(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for name, (cls, options) in KINDS.items():
        settings = getattr(peft, cls)(task_type="CAUSAL_LM", **options)
        found[name] = peft_adapters.save(
            tiny_llama.fp32, root / name, settings, 0.3 if name == "ia3" else 0.1
        )
    return found


@pytest.fixture(scope="module")
def mixed(
    tiny_llama: tiny.TinyLlama, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    target.export(tiny_llama.nf4, [(folder, 1.0) for folder in adapters.values()], out, mode="branch")
    return out


def test_the_page_lists_them() -> None:
    assert BRANCH.keys() == KINDS.keys()


def truth(base: Path, adapter: Path | None) -> torch.Tensor:
    model = load_dense(Checkpoint.open(base))
    return peft_adapters.logits(model if adapter is None else peft_adapters.unmerged(model, adapter))


def test_each_is_pefts_unmerged_forward(
    mixed: Path, tiny_llama: tiny.TinyLlama, adapters: dict[str, Path]
) -> None:
    session, plain = Session.open(mixed), truth(tiny_llama.nf4, None)
    resident = Session.open(mixed, resident=True)
    for name, folder in adapters.items():
        session.swap(named(name))
        wanted = truth(tiny_llama.nf4, folder)
        resident.swap(named(name), resident=True)
        np.testing.assert_array_equal(resident.logits(TOKENS), session.logits(TOKENS), name)
        assert peft_adapters.close(torch.from_numpy(np.array(session.logits(TOKENS))), wanted), name
        assert not peft_adapters.close(plain, wanted), name
        session.swap(None)
        assert peft_adapters.close(torch.from_numpy(np.array(session.logits(TOKENS))), plain), name


def test_a_file_brings_only_its_kinds(mixed: Path) -> None:
    held = {}
    for name, entry in bundle.read(mixed).adapters.items():
        read = onnxruntime.AdapterFormat.read_adapter(str(mixed / entry["file"]))
        held[name] = {parameter.rpartition(".")[2] for parameter in read.get_parameters()}
    assert held == {
        "default": {"lora_A", "lora_B"},
        "VERA": {"lambda_b", "lambda_d"},
        "LORA-use_dora": {"lora_A", "lora_B", "output_gain"},
        "IA3": {"output_gain", "input_gain"},
        **{named(name): {"lora_A", "lora_B"} for name in list(KINDS)[4:]},
    }


def test_it_stands_for_the_model_where_nothing_was_computed(mixed: Path) -> None:
    assert bundle.read(mixed).exact is False


def test_rows_of_one_batch_run_several_methods(mixed: Path) -> None:
    session, prompt = Session.open(mixed), "the adapter"
    choices = [*map(named, SOME), None]
    alone = []
    for choice in choices:
        session.swap(choice)
        alone.append("".join(session.generate(prompt, max_tokens=5)))
    rows = [""] * len(choices)
    for row, piece in session.generate_batch([prompt] * len(choices), adapters=choices, max_tokens=5):
        rows[row] += piece
    assert rows == alone and len(set(alone)) > 2


@pytest.mark.parametrize("name", [*SOME, "VBLORA"])
def test_packed_afterwards_it_is_the_file_of_the_export(
    name: str, mixed: Path, tiny_llama: tiny.TinyLlama, adapters: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    words: tuple[Any, ...] = (
        "adapter",
        "pack",
        adapters[name],
        "--for",
        mixed,
        "-o",
        tmp_path / "again.onnx_adapter",
    )
    if name in ("LORA, use_dora", "IA3", "HRA"):
        done = cli(*words)
        assert done.exit_code == 2 and "give --base" in " ".join(done.output.split()), done.output
        done = cli(*words, "--base", tiny_llama.fp32)
        assert done.exit_code == 2 and "made of another base" in " ".join(done.output.split()), done.output
        words = (*words, "--base", tiny_llama.nf4)
    assert cli(*words).exit_code == 0
    file = mixed / bundle.read(mixed).adapters[named(name)]["file"]
    assert (tmp_path / "again.onnx_adapter").read_bytes() == file.read_bytes()


def olives(folder: Path, path: Path) -> Path:
    """A LoRA as `olive convert-adapters` writes it, by what its source says."""
    config = peft.LoraConfig.from_pretrained(str(folder))
    form, arrays = onnxruntime.AdapterFormat(), {}
    for name, value in peft.load_peft_weights(str(folder), device="cpu").items():
        array = value.numpy().T.copy()
        array *= config.lora_alpha / config.r if "lora_B" in name else 1
        arrays[name.replace("base_model.model.model", "model")] = array
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({k: onnxruntime.OrtValue.ortvalue_from_numpy(array) for k, array in arrays.items()})
    form.export_adapter(str(path))
    return path


def test_a_lora_of_olives_is_packed(
    mixed: Path, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    folder = peft_adapters.save(tiny_llama.fp32, tmp_path / "lora", settings)
    file, packed = olives(folder, tmp_path / "olive.onnx_adapter"), tmp_path / "packed.onnx_adapter"
    done = cli("run", mixed, "the adapter", "--adapter", file)
    assert done.exit_code == 2 and "pack the adapter for this bundle" in " ".join(done.output.split())
    done = cli("adapter", "pack", file, "--for", mixed, "-o", packed)
    assert done.exit_code == 0, done.output
    found = torch.from_numpy(np.array(Session.open(mixed, packed).logits(TOKENS)))
    assert peft_adapters.close(found, truth(tiny_llama.nf4, folder))
    done = cli("adapter", "pack", packed, "--for", mixed, "-o", tmp_path / "again.onnx_adapter")
    assert done.exit_code == 2 and "a LoRA of Olive's holds pairs" in " ".join(done.output.split())


def test_genai_swaps_them_by_name(mixed: Path) -> None:
    import onnxruntime_genai as genai

    session, model = Session.open(mixed), genai.Model(str(mixed))
    loaded = genai.Adapters(model)
    for name in map(named, SOME[1:4]):
        session.swap(name)
        expected = list(TOKENS)
        for _ in range(4):
            expected.append(int(np.array(session.logits(np.array(expected)))[-1].argmax()))
        loaded.load(str(mixed / bundle.read(mixed).adapters[name]["file"]), name)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(TOKENS) + 4, do_sample=False)
        generator = genai.Generator(model, params)
        generator.set_active_adapter(loaded, name)
        generator.append_tokens(TOKENS.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(token) for token in generator.get_sequence(0)] == expected, name


def test_golden_and_drift_find_each_in_it(
    mixed: Path, tiny_llama: tiny.TinyLlama, adapters: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    out = shutil.copytree(mixed, tmp_path / "mixed")
    done = cli(
        "golden", out, tiny_llama.nf4, adapters["LORA, use_dora"], "--max-kl", "1e-6", "--min-top1", "1"
    )
    assert done.exit_code == 0, done.output
    assert cli("validate", out).exit_code == 0
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 4)
    words = ("--base", tiny_llama.nf4, "--data", text, "--max-kl", "1e-6")
    done = cli("drift", adapters["IA3"], out, *words)
    assert done.exit_code == 0, done.output


def test_a_change_of_full_rank_is_no_pair() -> None:
    draw = np.random.default_rng(2)
    a, b = draw.standard_normal((5, 64)).astype(np.float32), draw.standard_normal((40, 5)).astype(np.float32)
    pair = pair_of(b @ a)
    assert pair is not None and pair.rank == 5
    assert np.abs(pair.b @ pair.a - b @ a).max() < 1e-5
    assert pair_of(draw.standard_normal((40, 64)).astype(np.float32)) is None


def test_an_adapter_beside_two_bases_has_the_factors_of_each(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """DoRA's factors are of the rows of the very base: what was known of another one isn't taken for it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(tiny.load(tiny_llama.nf4), config).save_pretrained(tmp_path / "dora")
    one = read(tmp_path / "dora")
    module = "model.layers.0.self_attn.q_proj"
    by_name = replace(one, vectors={module: next(iter(one.vectors.values()))})
    for folder in (tiny_llama.nf4, tiny_llama.fp32):
        base = Checkpoint.open(folder)
        outputs = forms_of(by_name, base)[module].outputs
        change = by_name.vectors[module]
        assert isinstance(change, LoraPair) and change.magnitude is not None and outputs is not None
        merged = base.dequantize(module) + np.float32(change.scale) * change.b @ change.a
        np.testing.assert_allclose(outputs, change.magnitude / np.linalg.norm(merged, axis=1), rtol=1e-5)
