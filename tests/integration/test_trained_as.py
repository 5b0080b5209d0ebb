"""Commands given a float base and --trained-as, against PEFT's own model and against the folder itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from peft import VeraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from tests import tiny, tiny_encoder
from tests.conftest import Cli
from vera_edge.adapters import projection
from vera_edge.arrays import Float32
from vera_edge.trained.record import ASSUMED

TOKENS = torch.arange(3, 63)[None] * 5 % 384
WORDS = "nf4,double,compute=bf16"
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Trained:
    """A training run. base: the float folder, all that was ever saved of it. words: how it was loaded.

    a, b: the projections that PEFT held. logits: of the model as trained, exact in float32.
    """

    base: Path
    adapter: Path
    words: str
    a: Float32
    b: Float32
    logits: Float32


def train(base: Path, folder: Path, words: str, dtype: torch.dtype, **options: Any) -> Trained:
    """An adapter that PEFT made on `base` as it was loaded, save_projection=False."""
    quantization = BitsAndBytesConfig(**options) if options else None
    settings = VeraConfig(
        r=8,
        projection_prng_key=77,
        target_modules=list(TARGETS),
        save_projection=False,
        task_type="CAUSAL_LM",
    )
    live = get_peft_model(tiny.load(base, dtype=dtype, quantization_config=quantization), settings)
    tiny.randomize(live, 0.25, 5)
    live.save_pretrained(folder)
    a, b = (getattr(live.base_model, name)["default"].float() for name in ("vera_A", "vera_B"))
    return Trained(base, folder, words, a.numpy(), b.numpy(), _exact_logits(live, base, settings, a, b))


def exact(weight: Any) -> Any:
    """A parameter's values in float32; of a quantized one by bitsandbytes, which must not have run yet."""
    state = getattr(weight, "quant_state", None)
    if getattr(weight, "SCB", None) is not None:
        return bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    if state is None:
        return weight.data.float()
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    facts = (absmax, state.code, state.blocksize, state.shape, torch.float32)
    return _dequantize_4bit_compute(weight.data.view(torch.uint8).reshape(-1), *facts)


def _exact_logits(live: Any, base: Path, settings: Any, a: torch.Tensor, b: torch.Tensor) -> Float32:
    """PEFT's forward on the very values that the live model was loaded with, in float32."""
    dense = tiny.load(base)
    parameters = dict(dense.named_parameters())
    for name, parameter in live.base_model.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in parameters:
            parameters[plain].data = exact(parameter)
    wrapped = get_peft_model(dense, settings)
    for name, layer in wrapped.named_modules():
        if hasattr(layer, "vera_lambda_b"):
            trained = live.get_submodule(name)
            layer.vera_A["default"], layer.vera_B["default"] = a, b
            for kind in ("vera_lambda_b", "vera_lambda_d"):
                getattr(layer, kind)["default"].data = getattr(trained, kind)["default"].data.float()
    with torch.no_grad():
        found: Float32 = wrapped.eval()(input_ids=TOKENS).logits.float().numpy()
    return found


# By the words for it: the folder, and how it was loaded; the last is what transformers 4 did unless told.
RUNS: Mapping[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "nf4": ("bf16", torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    WORDS: ("bf16", torch.bfloat16, tiny.four_bit("nf4", compute="bfloat16")),
    "fp4": ("bf16", torch.bfloat16, {"load_in_4bit": True}),
    "int8": ("bf16", torch.bfloat16, {"load_in_8bit": True}),
    "bf16": ("fp32", torch.bfloat16, {}),
    "fp32": ("bf16", torch.float32, {}),
    "fp4,storage=bf16,compute=fp16,dtype=fp16": (
        "fp32",
        torch.float16,
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_storage": "bfloat16",
            "bnb_4bit_compute_dtype": "float16",
        },
    ),
}


@pytest.fixture(scope="module", params=RUNS)
def trained(
    request: pytest.FixtureRequest, tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    source, dtype, options = RUNS[request.param]
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    return train(getattr(tiny_llama, source), folder, request.param, dtype, **options)


def logits(folder: Path) -> Float32:
    with torch.no_grad():
        found: Float32 = tiny.load(folder).eval()(input_ids=TOKENS).logits.float().numpy()
    return found


def distance(one: Float32, other: Float32) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_the_merged_model_is_the_one_that_was_trained(trained: Trained, tmp_path: Path, cli: Cli) -> None:
    where = (trained.base, trained.adapter)
    given = cli(
        "merge", *where, "-o", tmp_path / "m", "--to", "fp32", "--trained-as", trained.words, "--json"
    )
    assert given.exit_code == 0, given.stderr
    assert distance(logits(tmp_path / "m"), trained.logits) < 1e-5
    assert not any("assuming" in note for note in json.loads(given.stdout)["notes"])
    left = cli("merge", *where, "-o", tmp_path / "wrong", "--to", "fp32", "--json")
    assert distance(logits(tmp_path / "wrong"), trained.logits) > 5e-5
    assert json.loads(left.stdout)["notes"].count(ASSUMED) == 1


def test_the_projections_are_those_that_peft_held(trained: Trained, cli: Cli) -> None:
    words = ("projections", trained.adapter, "--base", trained.base, "--json")
    given = json.loads(cli(*words, "--trained-as", trained.words).stdout)
    spec = projection.ProjectionSpec(**given["spec"])
    held = projection.Projections(spec, trained.a, trained.b)
    assert given["digest"] == held.digest
    assert given["notes"] == []
    left = json.loads(cli(*words).stdout)
    assert left["notes"] == [ASSUMED]
    # The dtype of the folder is all there is to go by, right or wrong.
    assert left["spec"]["rounding"] == {"bf16": "bfloat16", "fp32": "float32"}[trained.base.name]


def test_drift_is_measured_from_the_model_that_was_trained(
    trained: Trained, tmp_path: Path, cli: Cli
) -> None:
    where, words = (trained.base, trained.adapter), ("--trained-as", trained.words)
    cli("merge", *where, "-o", tmp_path / "m", "--to", "fp32", *words)
    measured = (
        "drift",
        trained.adapter,
        tmp_path / "m",
        "--base",
        trained.base,
        "--tokens",
        256,
        "--window",
        64,
    )
    given = json.loads(cli(*measured, *words, "--json").stdout)
    assert given["fidelity"]["kl"]["mean"]["value"] < 1e-8
    assert trained.words.split(",")[0] in given["reference"]["kind"]
    assert given["retained"]["value"] > 0.999
    assert ASSUMED not in given["notes"]
    left = json.loads(cli(*measured, "--json").stdout)
    assert left["fidelity"]["kl"]["mean"]["value"] > 1e-8
    assert left["notes"].count(ASSUMED) == 1


@dataclass(frozen=True)
class TwoWays:
    """One base in two folders of one name: `floats`, and `saved`, which `quantize` made of it."""

    floats: Path
    saved: Path
    adapter: Path


BOTH = (WORDS, "int8")


@pytest.fixture(scope="module", params=BOTH)
def two_ways(
    request: pytest.FixtureRequest, tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TwoWays, str]:
    """Both, and the words for it; the adapter's projections aren't saved."""
    from vera_edge.merging import quantize

    root = tmp_path_factory.mktemp("two-ways")
    shutil.copytree(tiny_llama.bf16, root / "floats" / "base")
    asked = {WORDS: quantize.Asked("nf4", None, True, "bfloat16"), "int8": quantize.Asked("int8")}
    saved = quantize.to_folder(tiny_llama.bf16, root / "saved" / "base", asked[request.param]).folder
    adapter = tiny.make_adapter(saved, root / "adapter", targets=TARGETS)
    return TwoWays(root / "floats" / "base", saved, adapter), request.param


def files(folder: Path) -> Mapping[str, bytes]:
    found = folder.rglob("*") if folder.is_dir() else [folder]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


def assert_equal_files(one: Path, other: Path) -> None:
    ours, theirs = files(one), files(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


MADE = {
    "merge-same": ("merge", "--to", "same"),
    "merge-nf4": ("merge", "--to", "nf4", "--method", "rtn"),
    "merge-compensated": ("merge", "--to", "fp4", "--workers", "2"),
    "merge-bf16": ("merge", "--to", "bf16"),
    "branch-nf4": ("export", "--mode", "branch", "--weights", "nf4"),
    "branch-same": ("export", "--mode", "branch", "--weights", "same"),
    "merged-int8": ("export", "--mode", "merged", "--weights", "int8"),
    "shipped": ("export", "--ship", "nf4", "--run", "int8", "--projections-from", "seed", "--mode", "branch"),
}


OF_4_BITS = ("branch-nf4", "branch-same", "shipped")  # no export keeps LLM.int8


@pytest.mark.parametrize(
    ("two_ways", "what"),
    [(words, what) for words in BOTH for what in MADE if words == WORDS or what not in OF_4_BITS],
    indirect=["two_ways"],
)
def test_the_same_bytes_either_way(
    what: str, two_ways: tuple[TwoWays, str], tmp_path: Path, cli: Cli
) -> None:
    folders, words = two_ways
    command, *options = MADE[what]
    for name, base, more in (
        ("saved", folders.saved, ()),
        ("floats", folders.floats, ("--trained-as", words)),
    ):
        result = cli(command, base, folders.adapter, "-o", tmp_path / name / "out", *options, *more)
        assert result.exit_code == 0, result.stderr
    assert_equal_files(tmp_path / "floats", tmp_path / "saved")


@pytest.mark.parametrize("kind", ["embeddings", "classes"])
def test_the_same_bytes_of_an_encoder(kind: str, tmp_path: Path, cli: Cli) -> None:
    """Its pooler and its classifier are quantized too, as transformers has it."""
    from vera_edge.merging import quantize

    family = tiny_encoder.EMBEDDINGS if kind == "embeddings" else tiny_encoder.classifier()
    base, adapter = tiny_encoder.make(family, tmp_path)
    saved = quantize.to_folder(base, tmp_path / "saved" / "base", quantize.Asked("nf4")).folder
    for options in (("--mode", "branch", "--weights", "nf4"), ("--weights", "int8")):
        for name, folder, more in (("one", saved, ()), ("other", base, ("--trained-as", "nf4"))):
            words = (folder, adapter, "-o", tmp_path / name, "--force", *options, *more)
            assert cli("export", *words).exit_code == 0
        assert_equal_files(tmp_path / "one", tmp_path / "other")


def test_the_same_bytes_of_conv1d(tiny_gpt2: Path, tiny_gpt2_adapter: Path, tmp_path: Path, cli: Cli) -> None:
    from vera_edge.merging import quantize

    saved = quantize.to_folder(tiny_gpt2, tmp_path / tiny_gpt2.name, quantize.Asked("fp4")).folder
    for name, folder, more in (("one", saved, ()), ("other", tiny_gpt2, ("--trained-as", "fp4"))):
        assert cli("merge", folder, tiny_gpt2_adapter, "-o", tmp_path / name, *more).exit_code == 0
    assert_equal_files(tmp_path / "one", tmp_path / "other")


def test_the_same_plan_and_what_is_made_by_it(
    two_ways: tuple[TwoWays, str], tmp_path: Path, cli: Cli
) -> None:
    folders, words = two_ways
    given = ("--trained-as", words)
    options = ("--max-kl", 0.05, "--tokens", 128, "--method", "rtn")
    for name, base, more in (("saved", folders.saved, ()), ("floats", folders.floats, given)):
        made = cli("plan", base, folders.adapter, "-o", tmp_path / f"{name}.json", *options, *more)
        assert made.exit_code == 0, made.stderr
    assert_equal_files(tmp_path / "floats.json", tmp_path / "saved.json")
    where = (folders.floats, folders.adapter, "--plan", tmp_path / "saved.json", "--method", "rtn")
    made = cli("export", *where, "-o", tmp_path / "out", *given)
    assert made.exit_code == 0, made.stderr
    left = cli("export", *where, "-o", tmp_path / "left")
    assert left.exit_code == 2
    assert "made for another base" in left.stderr


def test_the_same_answers_measured_and_asked(two_ways: tuple[TwoWays, str], tmp_path: Path, cli: Cli) -> None:
    folders, words = two_ways
    given = ("--trained-as", words)
    bundle = tmp_path / "bundle"
    exported = cli("export", folders.saved, folders.adapter, "-o", bundle, "--weights", "int8")
    assert exported.exit_code == 0, exported.stderr
    measured = ("drift", folders.adapter, bundle, "--tokens", 256, "--window", 64, "--json")
    told = [
        json.loads(cli(*measured, "--base", base, *more).stdout)
        for base, more in ((folders.saved, ()), (folders.floats, given))
    ]
    assert told[0]["fidelity"] == told[1]["fidelity"]
    assert told[0]["effect"] == told[1]["effect"]
    assert told[0]["reference"]["kind"] == told[1]["reference"]["kind"]
    shutil.copytree(bundle, tmp_path / "other")
    for place, base, more in ((bundle, folders.saved, ()), (tmp_path / "other", folders.floats, given)):
        asked = cli("golden", place, base, folders.adapter, *more)
        assert asked.exit_code == 0, asked.stderr
        assert "assuming" not in asked.stderr
    assert_equal_files(bundle, tmp_path / "other")
    refused = cli("golden", tmp_path / "other", folders.floats, folders.adapter)
    assert refused.exit_code == 2
    assert "made of another base" in refused.stderr


def test_the_same_lora(two_ways: tuple[TwoWays, str], tmp_path: Path, cli: Cli) -> None:
    folders, words = two_ways
    for name, base, more in (
        ("saved", folders.saved, ()),
        ("floats", folders.floats, ("--trained-as", words)),
    ):
        made = cli("adapter", "to-lora", folders.adapter, "--base", base, "-o", tmp_path / name, *more)
        assert (made.exit_code, "assuming" in made.stderr) == (0, False)
    assert_equal_files(tmp_path / "saved", tmp_path / "floats")
    left = cli("adapter", "to-lora", folders.adapter, "--base", folders.floats, "-o", tmp_path / "left")
    assert ASSUMED in left.stderr


RECIPE = """
[release]
name = "tiny"
[[base]]
id = "tiny"
path = "base"
{trained_as}
[[adapter]]
id = "a"
base = "tiny"
path = "a"
[[adapter]]
id = "b"
base = "tiny"
path = "b"
[[variant]]
mode = "branch"
weights = "int8"
[limits]
data = "t.txt"
tokens = 256
window = 32
"""
# These name the inputs by their digests and sizes, and those are two folders.
OF_THE_INPUTS = {
    *("README.md", "chunks.json", "vera_edge.json"),
    *(f"evidence/{name}.json" for name in ("drift", "provenance", "recipe", "sbom.cdx")),
}


@pytest.mark.parametrize("two_ways", [WORDS], indirect=True)
def test_the_same_release(two_ways: tuple[TwoWays, str], tmp_path: Path, cli: Cli) -> None:
    folders, words = two_ways
    said = {"saved": "", "floats": f'trained_as = "{words}"', "silent": ""}
    told = {}
    for name, line in said.items():
        inputs = tmp_path / name
        shutil.copytree(folders.saved if name == "saved" else folders.floats, inputs / "base")
        for adapter in ("a", "b"):
            shutil.copytree(folders.adapter, inputs / adapter)
        (inputs / "t.txt").write_text(tiny.TEXT * 8)
        (inputs / "r.toml").write_text(RECIPE.format(trained_as=line))
        made = cli(
            "release", inputs / "r.toml", "-o", tmp_path / f"out-{name}", "--store", tmp_path / "store"
        )
        assert made.exit_code == 0, made.stderr
        told[name] = made.stderr
    bundle = Path("a", "onnx-branch-int8")
    ours, theirs = (files(tmp_path / f"out-{name}" / bundle) for name in ("floats", "saved"))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == OF_THE_INPUTS
    reports = [json.loads(side["evidence/drift.json"]) for side in (ours, theirs)]
    for report in reports:
        del report["reference"]["bytes"], report["base"]["bytes"]
    assert reports[0] == reports[1]
    assert [note.count(ASSUMED) for note in told.values()] == [0, 0, 1]
    assert files(tmp_path / "out-silent" / bundle)["golden.json"] != ours["golden.json"]
    again = cli("release", "rebuild", tmp_path / "out-floats" / bundle, "--inputs", tmp_path / "floats")
    assert again.exit_code == 0, again.stderr


def test_a_recipe_with_words_that_say_nothing_is_refused(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.format(trained_as='trained_as = "nf4,dubble"'))
    refused = cli("release", tmp_path / "r.toml", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "base[0] has a trained_as that can't be read: 'dubble' says nothing" in refused.stderr
