"""Every method on every base format: merged, and as the reference, it is PEFT's own unmerged forward.

docs/methods.md holds the table that this makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests import peft_adapters, tiny
from tests.peft_adapters import METHODS
from vera_edge import merging as merge
from vera_edge.adapters import reading
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.reference.model import load_dense
from vera_edge.trained.inspection import inspect_folder
from vera_edge.trained.trained_model import open_model

FORMATS = ("fp32", "bf16", "nf4", "fp4", "int8", "gptq", "awq", "fp8", "hqq")
# Of a single layer's worth of arithmetic in bfloat16 or in another order, which PEFT does as it merges.
LOOSE = {"RANDLORA": 5e-4}


@pytest.fixture(scope="module")
def float_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=128, initializer_range=0.15, **settings
    )
    torch.manual_seed(3)
    return tiny.save(LlamaForCausalLM(config), tmp_path_factory.mktemp("base") / "fp32")


def hqq_base(source: Path, folder: Path) -> Path:
    """The linears of `source` in HQQ's own storage, 8 bits in groups of 64 inputs, by arithmetic."""
    state = load_file(source / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, values in state.items():
        if "_proj.weight" not in name:
            stored[name] = values
            continue
        groups = values.reshape(-1, 64)
        low, high = groups.min(dim=1, keepdim=True)[0], groups.max(dim=1, keepdim=True)[0]
        scale = ((high - low) / 255).half()
        zero = (-low / scale.float()).half()
        codes = (groups / scale.float() + zero.float()).round().clamp(0, 255).to(torch.uint8)
        parts = {
            "W_q": codes,
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor(values.shape),
            "packing": torch.tensor(list(b"8bit_u8"), dtype=torch.uint8),
            "axis": torch.tensor(1, dtype=torch.int32),
            "group_size": torch.tensor(64, dtype=torch.int32),
        }
        stored |= {f"{name.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
    shutil.copytree(source, folder)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    return folder


@pytest.fixture(scope="module")
def bases(float_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("bases"), {"fp32": float_base}
    nothing = peft_adapters.save(
        float_base, root / "nothing", peft.LoraConfig(r=1, target_modules=["q_proj"]), strength=0.0
    )
    for name in FORMATS:
        if name == "hqq":
            found[name] = hqq_base(float_base, root / name)
        elif name != "fp32":
            options = {"group_size": 32} if name in ("gptq", "awq") else None
            merge.to_folder(float_base, [(nothing, 1.0)], root / name, name, options)
            found[name] = root / name
    return found


@pytest.fixture(scope="module")
def adapters(float_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: peft_adapters.save_method(float_base, root / name.lower(), name) for name in METHODS}


TITLES = {"fp32": "float32", "bf16": "bfloat16", "int8": "LLM.int8", "fp8": "FP8"}
AS_PAIRS = "ONNX and GGUF, as a LoRA"
BRANCH = {
    "VERA": "ONNX, GGUF",
    "LORA": "ONNX, GGUF",
    "LORA, use_dora": "ONNX",
    "IA3": "ONNX",
    **dict.fromkeys(
        ("ADALORA", "DEFT", "DELORA", "GRALORA", "HRA", "LOHA", "MISS", "PVERA", "VBLORA"), AS_PAIRS
    ),
}
PAGE = Path(__file__).parents[3] / "docs" / "methods.md"


def table() -> str:
    """What the tests below hold, as docs/methods.md has it: a row for each method, a column for each base."""
    heads = [TITLES.get(name, name.upper()) for name in FORMATS]
    rows = ["| method | " + " | ".join(heads) + " | beside a base |", "|---" * (len(FORMATS) + 2) + "|"]
    for method in METHODS:
        peft_type, _, variant = method.partition(", ")
        title = reading.METHODS[peft_type].title + (f" (`{variant}`)" if variant else "")
        rows.append(f"| {title} |" + " merged |" * len(FORMATS) + f" {BRANCH.get(method, 'no')} |")
    return "\n".join(rows)


def test_the_page_has_the_table() -> None:
    found = (
        PAGE.read_text(encoding="utf-8")
        .partition("<!-- methods -->\n")[2]
        .partition("\n<!-- /methods -->")[0]
    )
    assert found == table()
    assert {method.partition(",")[0] for method in METHODS} == set(reading.METHODS)


def merged(base: Path, folder: Path) -> Any:
    """The base with every layer's merged weight in it, as a merge computes it, in float32."""
    model = open_model(base, [(folder, 1.0)])
    dense = load_dense(model.checkpoint)
    for module in model.adapters[0].adapter.vectors:
        weight = torch.from_numpy(merge.merged_weight(model, module))
        dense.get_submodule(module).weight.data = weight
    return dense


@pytest.mark.parametrize("method", METHODS)
def test_merged_it_is_pefts_unmerged_forward(
    method: str, bases: dict[str, Path], adapters: dict[str, Path]
) -> None:
    folder, bound = adapters[method], LOOSE.get(method, 1e-4)
    for name, base in bases.items():
        exact = load_dense(Checkpoint.open(base))
        plain = peft_adapters.logits(exact)
        truth = peft_adapters.logits(peft_adapters.unmerged(exact, folder))
        scale = float(truth.abs().max())
        assert float((plain - truth).abs().max()) > 0.02 * scale, f"{method} changes nothing of {name}"
        found = peft_adapters.logits(merged(base, folder))
        assert float((found - truth).abs().max()) < bound * scale, (method, name)


# Whose rank isn't the config's r, or who have none.
RANKS = {"ADALORA": 4, "BOFT": 0, "C3A": 0, "FOURIERFT": 0, "IA3": 0, "OFT": 0, "ROAD": 0, "SUPERTUNING": 0}
RANKS |= {"WAVEFT": 0}


@pytest.mark.parametrize("method", METHODS)
def test_inspect_says_what_each_is(method: str, float_base: Path, adapters: dict[str, Path]) -> None:
    folder = adapters[method]
    told = inspect_folder(folder, float_base)
    model = peft.PeftModel.from_pretrained(tiny.load(float_base), str(folder), is_trainable=True)
    assert told.parameters == model.get_nb_trainable_parameters()[0]
    assert told.rank == RANKS.get(method, getattr(model.peft_config["default"], "r", 0))
    assert told.method == method.partition(",")[0] and told.fits and told.layers == (0, 1)
    assert [(kind.name, kind.modules) for kind in told.kinds] == [
        (name, 2) for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj")
    ]
    assert told.does
    trained = {name for name, values in model.named_parameters() if values.requires_grad}
    for kind in told.kinds:
        for name in kind.ranges:  # each of them trained, by PEFT's own account
            ends = [f"{kind.name}.{prefix}{name.removesuffix('.weight')}" for prefix in ("", "vera_")]
            assert any(end in parameter for end in ends for parameter in trained), name
