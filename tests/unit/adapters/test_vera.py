"""Adapter folders as PEFT writes them, and as they get damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import tiny
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.reading import read
from vera_edge.adapters.vera import vectors_of
from vera_edge.errors import AdapterError

GOLDEN = Path(__file__).parents[2] / "golden" / "adapters"
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "VERA",
    "r": 4,
    "projection_prng_key": 7,
    "save_projection": False,
    "bias": "none",
    "target_modules": ["up_proj"],
    "base_model_name_or_path": "some/base",
    "peft_version": "0.21.2",
}
UP = "model.layers.0.mlp.up_proj"

Write = Callable[..., Path]


def tensors_of_one_layer() -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{UP}.vera_lambda_b": torch.linspace(-1, 1, 6),
        f"{PREFIX}{UP}.vera_lambda_d": torch.full((4,), 0.1),
    }


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Writes an adapter folder; `tensors` and `config` change or, with None, leave out what CONFIG has."""

    def write(tensors: Mapping[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
        folder = tmp_path / "my adapter"
        folder.mkdir(exist_ok=True)
        merged = {**tensors_of_one_layer(), **(tensors or {})}
        kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        facts = {name: value for name, value in {**CONFIG, **config}.items() if value is not Ellipsis}
        (folder / "adapter_config.json").write_text(json.dumps(facts))
        return folder

    return write


def plain(adapter: Adapter) -> dict[str, Any]:
    """Every tensor of an adapter, by module and role."""
    found = {f"{module}.vera_lambda_b": pair.lambda_b for module, pair in vectors_of(adapter).items()}
    found |= {f"{module}.vera_lambda_d": pair.lambda_d for module, pair in vectors_of(adapter).items()}
    return found


@pytest.mark.parametrize(
    "folder", sorted(GOLDEN.glob("peft-*/*/")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_reads_what_every_peft_wrote(folder: Path) -> None:
    theirs = {
        name.removeprefix(PREFIX): tensor.numpy()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    ours = read(folder)
    found = plain(ours)
    found |= {name: tensor.array() for name, tensor in ours.modules_to_save.items()}
    if ours.saved:
        found |= dict(zip(("base_model.vera_A", "base_model.vera_B"), ours.saved, strict=True))
    assert found.keys() == theirs.keys()
    for name, values in theirs.items():
        assert np.array_equal(found[name], values), name
    assert (ours.rank, ours.seed) == (4, config["projection_prng_key"])
    assert (ours.saved is not None) == config["save_projection"]
    assert ours.peft_version == config.get("peft_version")
    assert ours.base_name == config["base_model_name_or_path"]


def test_peft_records_its_version_from_0_18_1_on() -> None:
    recorded = {folder.name: read(folder / "saved-fp32").peft_version for folder in GOLDEN.glob("peft-*")}
    for name, version in recorded.items():
        old = name in ("peft-0.12.0", "peft-0.14.0", "peft-0.17.1")
        assert version == (None if old else name.removeprefix("peft-"))


def test_reads_trained_biases(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = tiny.make_adapter(
        tiny_gpt2, tmp_path / "adapter", targets=("c_attn", "c_fc"), bias="vera_only", fan_in_fan_out=True
    )
    ours = read(folder)
    base = tiny.load(tiny_gpt2)
    assert ours.biases.keys() == ours.vectors.keys()
    for module, bias in ours.biases.items():
        assert np.array_equal(bias, base.get_submodule(module).bias.detach().numpy())


def test_reads_every_bias_and_a_whole_module(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = tiny.make_adapter(
        tiny_gpt2,
        tmp_path / "adapter",
        targets=("c_fc",),
        bias="all",
        modules_to_save=["ln_f"],
        fan_in_fan_out=True,
    )
    ours = read(folder)
    assert set(ours.modules_to_save) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert "transformer.h.0.ln_1" in ours.biases
    assert "transformer.h.1.mlp.c_fc" in ours.biases
    assert not {name for name in ours.biases if "ln_f" in name}


def test_reads_an_adapted_head(tmp_path: Path) -> None:
    """PEFT saves the whole head beside its vectors when `lm_head` is a target."""
    from peft import VeraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    settings_ = VeraConfig(r=4, target_modules=["lm_head"], save_projection=True)
    model = get_peft_model(LlamaForCausalLM(config), settings_)
    model.save_pretrained(tmp_path)
    ours = read(tmp_path)
    assert list(ours.vectors) == ["lm_head"]
    assert set(ours.modules_to_save) == {"lm_head.weight"}


def test_widens_vectors_saved_in_half_precision(written: Write) -> None:
    exact = torch.linspace(-1, 1, 6)
    for dtype in (torch.bfloat16, torch.float16):
        halved = {name: tensor.to(dtype) for name, tensor in tensors_of_one_layer().items()}
        pair = vectors_of(read(written(halved)))[UP]
        assert pair.lambda_b.dtype == np.float32
        assert np.array_equal(pair.lambda_b, exact.to(dtype).float().numpy())


def test_reads_keys_without_pefts_prefix(written: Write) -> None:
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors_of_one_layer().items()}
    folder = written({**dict.fromkeys(tensors_of_one_layer()), **bare})
    assert list(read(folder).vectors) == [UP]


def test_name_is_safe_in_a_file_name(written: Write) -> None:
    assert read(written()).name == "my-adapter"


def test_digest_ignores_names_and_order_but_no_value(written: Write) -> None:
    before = read(written()).digest
    assert read(written(base_model_name_or_path="other", target_modules=["x"])).digest == before
    assert read(written(projection_prng_key=8)).digest != before
    assert read(written(peft_version="0.18.1")).digest != before
    changed = torch.linspace(-1, 1, 6)
    changed[3] = changed[3].nextafter(torch.tensor(2.0))
    assert read(written({f"{PREFIX}{UP}.vera_lambda_b": changed})).digest != before


def nan_in(name: str, shape: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1] = value
    return {name: tensor}


A, B = "base_model.vera_A", "base_model.vera_B"
LAMBDA_B, LAMBDA_D = f"{PREFIX}{UP}.vera_lambda_b", f"{PREFIX}{UP}.vera_lambda_d"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (nan_in(LAMBDA_B, (6,), float("nan")), {}, r"up_proj.vera_lambda_b of .* holds NaN or infinite"),
        (nan_in(LAMBDA_D, (4,), float("inf")), {}, r"up_proj.vera_lambda_d of .* holds NaN or infinite"),
        ({**nan_in(A, (4, 8), -float("inf")), B: torch.ones(6, 4)}, {}, "vera_A of .* holds NaN or infinite"),
        ({LAMBDA_D: None}, {}, f"holds no vera_lambda_d for {UP}, only the other half"),
        ({LAMBDA_B: None}, {}, f"holds no vera_lambda_b for {UP}, only the other half"),
        (
            {LAMBDA_B: None, LAMBDA_D: None, A: torch.ones(4, 8), B: torch.ones(6, 4)},
            {},
            "holds no VeRA vectors",
        ),
        ({LAMBDA_D: torch.ones(5)}, {}, f"vera_lambda_d of {UP} in .* has 5 values, but .* r = 4"),
        ({LAMBDA_B: torch.ones(6, 1)}, {}, r"is F32 of shape \[6, 1\] where floats in 1 dimension belong"),
        ({LAMBDA_B: torch.ones(6, dtype=torch.int32)}, {}, r"is I32 of shape \[6\] where floats"),
        (
            {LAMBDA_B: torch.ones(0)},
            {},
            r"is empty \(shape \[0\]\); it was saved without gathering its parts",
        ),
        ({LAMBDA_D: torch.ones(0, 4)}, {}, r"is empty \(shape \[0, 4\]\); it was saved without gathering"),
        (
            {f"{PREFIX}lm_head.weight": torch.ones(0, dtype=torch.bfloat16)},
            {"modules_to_save": ["lm_head"]},
            r"lm_head.weight of .* is empty \(shape \[0\]\); .*stage3_gather_16bit_weights_on_model_save",
        ),
        (
            {LAMBDA_B: None, LAMBDA_D: None},
            {},
            "holds no VeRA vectors; .*, or it was saved without gathering",
        ),
        (
            {f"{PREFIX}model.layers.0._fsdp_wrapped_module._flat_param": torch.ones(9)},
            {},
            r"_flat_param of .* isn't part .*; it was saved without gathering .* or from a full state dict",
        ),
        ({A: torch.ones(4, 8)}, {}, "holds vera_A without its other half"),
        (
            {A: torch.ones(4, 8), B: torch.ones(5, 4)},
            {},
            r"\[4, 8\] and \[5, 4\], which don't fit rank 4 and 6",
        ),
        ({A: torch.ones(3, 8), B: torch.ones(6, 3)}, {}, "which don't fit rank 4"),
        ({}, {"save_projection": True}, "should hold its projections"),
        ({f"{PREFIX}{UP}.lora_A.weight": torch.ones(4, 8)}, {}, "lora_A.weight of .* isn't part of a VeRA"),
        ({f"{PREFIX}{UP}.bias": torch.ones(6)}, {}, "up_proj.bias of .* isn't part of a VeRA"),
        (
            {},
            {"peft_type": "MINE"},
            "adapter of type MINE, which vera-edge doesn't know; it takes",
        ),
        ({}, {"peft_type": "PROMPT_TUNING"}, "type PROMPT_TUNING, which trains a prompt and no weight"),
        ({}, {"peft_type": ...}, "of type None"),
        ({}, {"r": 0}, "gives rank r = 0"),
        ({}, {"r": "4"}, "r is '4' where an integer belongs"),
        ({}, {"r": ...}, "r is None where an integer belongs"),
        ({}, {"projection_prng_key": 1.5}, "projection_prng_key is 1.5 where an integer belongs"),
        ({}, {"bias": "lora_only"}, "bias is 'lora_only', not none, all or vera_only"),
        ({}, {"peft_version": 0.21}, "peft_version is 0.21 where a text belongs"),
        ({}, {"base_model_name_or_path": ["a"]}, "where a text belongs"),
    ],
)
def test_refuses(
    written: Write, tensors: dict[str, torch.Tensor | None], config: dict[str, Any], message: str
) -> None:
    folder = written(tensors, **config)
    with pytest.raises(AdapterError, match=message):
        read(folder)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_double_beyond_float32_is_not_finite(written: Write) -> None:
    folder = written({LAMBDA_B: torch.full((6,), 1e300, dtype=torch.float64)})
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        read(folder)


def test_refuses_a_prompt_as_peft_wrote_it(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny.load(tiny_llama.fp32), settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="of type PROMPT_TUNING, which trains a prompt and no weight"):
        read(tmp_path)


def test_refuses_a_pickle(written: Write) -> None:
    folder = written()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"as a pickle \(adapter_model.bin\), which can run code"):
        read(folder)


def test_refuses_folders_that_are_not_adapters(written: Write, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="isn't a folder; give the folder that holds"):
        read(tmp_path / "nowhere")
    folder = written()
    with pytest.raises(AdapterError, match="isn't a folder"):
        read(folder / "adapter_config.json")
    with pytest.raises(AdapterError, match="it has adapters in subfolders: give one of my adapter"):
        read(tmp_path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="isn't valid JSON"):
        read(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json, so it isn't a PEFT adapter"):
        read(folder)


def test_refuses_a_file_cut_short(written: Write) -> None:
    folder = written()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="where its header promises"):
        read(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_ends_in_a_traceback(written: Write, data: st.DataObject) -> None:
    """Any bytes changed in either file: the adapter is read, or refused in one sentence."""
    folder = written()
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    damaged = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(damaged)
    try:
        read(folder)
    except AdapterError as cause:
        assert "\n" not in str(cause)


def test_does_not_depend_on_where_the_folder_is(written: Write, tmp_path: Path) -> None:
    folder = written()
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert read(copy).digest == read(folder).digest


@pytest.mark.parametrize("key", sorted(CONFIG))
def test_junk_in_a_field_of_the_config_is_a_sentence_or_harmless(written: Write, key: str) -> None:
    values: tuple[Any, ...] = (
        None,
        True,
        -1,
        2**70,
        10**200,
        1e300,
        "",
        "\ud800",
        "x" * 5000,
        [],
        [[]],
        {},
        {"a": None},
    )
    for junk in values:
        try:
            read(written(**{key: junk}))
        except AdapterError as cause:
            assert "\n" not in str(cause)
            str(cause).encode()


def test_half_a_character_is_a_sentence(written: Write) -> None:
    """It was a traceback where the digest is made."""
    with pytest.raises(AdapterError, match="lone surrogate"):
        read(written(peft_version="\ud800"))
