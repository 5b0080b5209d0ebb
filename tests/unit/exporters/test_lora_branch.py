"""LoRA beside an untouched base: what ONNX Runtime computes is PEFT's unmerged forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from peft import LoraConfig, OFTConfig

from tests import peft_adapters, tiny
from tests.conftest import Cli
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import target
from vera_edge.exporting.onnx_adapter import pack_folder
from vera_edge.reference.model import load_dense

TOKENS = peft_adapters.TOKENS[0].numpy()
SOME = ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"]


def lora(base: Path, folder: Path, **options: Any) -> Path:
    settings = {"target_modules": SOME, "task_type": "CAUSAL_LM", **options}
    return peft_adapters.save(base, folder, LoraConfig(**settings))


@pytest.fixture(scope="module")
def first(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    return lora(tiny_llama.fp32, tmp_path_factory.mktemp("lora") / "first", **options)


@pytest.fixture(scope="module")
def second(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a smaller rank, on fewer layers."""
    folder = tmp_path_factory.mktemp("lora") / "second"
    return lora(tiny_llama.fp32, folder, r=3, target_modules=["v_proj", "down_proj"])


@pytest.fixture(scope="module")
def branch(tiny_llama: tiny.TinyLlama, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("branch") / "out"
    target.export(tiny_llama.nf4, [(first, 1.0)], out, mode="branch")
    return out


def truth(base: Path, adapter: Path | None) -> torch.Tensor:
    """PEFT's unmerged logits (n, vocabulary) over the base's exact values."""
    model = load_dense(Checkpoint.open(base))
    return peft_adapters.logits(model if adapter is None else peft_adapters.unmerged(model, adapter))


@pytest.fixture(scope="module")
def packed(branch: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_folder(second, branch, tmp_path_factory.mktemp("packed") / "second.onnx_adapter").path


def test_each_adapter_and_none_is_pefts_unmerged_forward(
    branch: Path, tiny_llama: tiny.TinyLlama, first: Path, second: Path, packed: Path
) -> None:
    manifest = bundle.read(branch)
    assert (manifest.lora_rank, manifest.projection, manifest.exact) == (4, None, True)
    session, base = Session.open(branch, four_bit="kept"), tiny_llama.nf4
    for adapter, folder in (("default", first), (packed, second), (None, None), ("default", first)):
        session.swap(adapter)
        found = torch.from_numpy(np.array(session.logits(TOKENS)))
        assert peft_adapters.close(found, truth(base, folder)), adapter
    assert not peft_adapters.close(truth(base, first), truth(base, second))


def test_rows_of_one_batch_run_different_adapters(branch: Path, packed: Path) -> None:
    session, prompt = Session.open(branch, four_bit="kept"), "the adapter"
    choices: list[str | Path | None] = ["default", packed, None]
    alone = []
    for adapter in choices:
        session.swap(adapter)
        alone.append("".join(session.generate(prompt, max_tokens=6)))
    rows = ["", "", ""]
    for row, piece in session.generate_batch([prompt] * 3, adapters=choices, max_tokens=6):
        rows[row] += piece
    assert rows == alone and len(set(alone)) > 1


def test_run_takes_each_by_name_or_file(branch: Path, packed: Path, cli: Cli) -> None:
    texts = []
    for choice in ("default", packed, "none"):
        done = cli("run", branch, "the adapter", "--adapter", choice, "--max-tokens", 6)
        assert done.exit_code == 0, done.output
        texts.append(done.stdout)
    assert len(set(texts)) > 1


def test_onnxruntime_swaps_the_file_by_itself(
    branch: Path, tiny_llama: tiny.TinyLlama, second: Path, packed: Path
) -> None:
    inner = onnxruntime.InferenceSession(branch / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {}
    for port in inner.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in port.shape]
        if port.name in ("input_ids", "attention_mask", "position_ids"):
            count = len(TOKENS)
            values = {"input_ids": TOKENS, "attention_mask": np.ones(count), "position_ids": np.arange(count)}
            feeds[port.name] = values[port.name][None].astype(np.int64)
        else:
            feeds[port.name] = np.zeros([1, shape[1], 0, shape[3]], np.float32)
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(packed))
    options.add_active_adapter(adapter)
    found = torch.from_numpy(inner.run(["logits"], feeds, options)[0][0])
    assert peft_adapters.close(found, truth(tiny_llama.nf4, second))


def test_genai_swaps_it(branch: Path, packed: Path) -> None:
    import onnxruntime_genai as genai

    session = Session.open(branch, four_bit="kept")
    session.swap(packed)
    expected = list(TOKENS)
    for _ in range(5):
        expected.append(int(np.array(session.logits(np.array(expected)))[-1].argmax()))
    model = genai.Model(str(branch))
    adapters = genai.Adapters(model)
    adapters.load(str(packed), "second")
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(TOKENS) + 5, do_sample=False)
    generator = genai.Generator(model, params)
    generator.set_active_adapter(adapters, "second")
    generator.append_tokens(TOKENS.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)] == expected


def test_refuses_what_has_no_place(
    branch: Path, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    wide = lora(tiny_llama.fp32, tmp_path / "wide", r=5)
    other = lora(tiny_llama.fp32, tmp_path / "other", r=2, target_modules=["o_proj"])
    dora = lora(tiny_llama.fp32, tmp_path / "dora", r=2, use_dora=True)
    for folder, message in (
        (wide, "has rank 5, and the side-branches"),
        (other, "has no side-branch for"),
        (dora, "brings factors of outputs, and the side-branches"),
        (tiny_adapter, "is an adapter of VeRA, and the side-branches"),
    ):
        done = cli("adapter", "pack", folder, "--for", branch, "-o", tmp_path / "x.onnx_adapter")
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    turned = tmp_path / "oft"
    peft_adapters.save(
        tiny_llama.fp32, turned, OFTConfig(target_modules=SOME, oft_block_size=8, r=0, task_type="CAUSAL_LM")
    )
    done = cli("export", tiny_llama.nf4, turned, "-o", tmp_path / "x", "--mode", "branch")
    assert done.exit_code == 2 and "can't stand beside a layer" in " ".join(done.output.split())
    words = ("--mode", "branch", "--store-projections", "int8")
    done = cli("export", tiny_llama.nf4, wide, "-o", tmp_path / "x", *words)
    assert done.exit_code == 2 and "no projections to store" in " ".join(done.output.split())


def test_merged_int8_and_drift_take_it(
    tiny_llama: tiny.TinyLlama, first: Path, branch: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "merged"
    done = cli("export", tiny_llama.nf4, first, "-o", out, "--weights", "int8")
    assert done.exit_code == 0, done.output
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 8)
    for folder, bound in ((branch, 1e-6), (out, 0.05)):
        done = cli("drift", first, folder, "--base", tiny_llama.nf4, "--data", text, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["fidelity"]["kl"]["mean"]["value"] < bound


def test_golden_vectors_are_asked_of_pefts_layers_and_held(
    tiny_llama: tiny.TinyLlama, first: Path, branch: Path, tmp_path: Path, cli: Cli
) -> None:
    out = shutil.copytree(branch, tmp_path / "branch")
    done = cli("golden", out, tiny_llama.nf4, first, "--max-kl", "1e-6", "--min-top1", "1")
    assert done.exit_code == 0, done.output
    assert cli("validate", out).exit_code == 0
    bundle.write(out, bundle.change(bundle.read(out), limits={"max_kl": 0.0}))
    assert cli("validate", out).exit_code == 3


def test_inspect_gives_no_price_of_a_branch_to_what_can_only_be_merged(
    tiny_llama: tiny.TinyLlama, first: Path, tmp_path: Path, cli: Cli
) -> None:
    settings = OFTConfig(target_modules=SOME, oft_block_size=8, r=0, task_type="CAUSAL_LM")
    turned = peft_adapters.save(tiny_llama.fp32, tmp_path / "oft", settings)
    assert json.loads(cli("inspect", turned, "--json").stdout)["cost"] is None
    assert "it can only be merged" in cli("inspect", turned).output
    assert json.loads(cli("inspect", first, "--json").stdout)["cost"]["vectors"]["fp32"] > 0
