"""Adapters combined here against PEFT's own `add_weighted_adapter`, and against PEFT's deltas of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig
from peft.utils import merge_utils
from safetensors.numpy import load_file

from tests import peft_adapters, tiny
from tests.conftest import Cli
from vera_edge import merging
from vera_edge.combining.arithmetic import combined
from vera_edge.combining.combination import KINDS, ON_FACTORS, Combination
from vera_edge.combining.combine import combine
from vera_edge.combining.folder import WEIGHTS as WEIGHTS_FILE
from vera_edge.combining.to_lora import to_lora
from vera_edge.errors import AdapterError, MismatchError, OutputError, PlanError

WEIGHTS = {"one": 0.7, "two": -0.4, "three": 0.5}
TOLERANCE = 2e-6  # of the largest value of a delta: float32, summed in another order


@dataclass(frozen=True)
class Made:
    """LoRA adapters of rank 4 on other layers and with other scales; and all of them in one PEFT model."""

    base: Path
    folders: Mapping[str, Path]
    model: Any

    @property
    def weighted(self) -> list[tuple[Path, float]]:
        return [(self.folders[name], weight) for name, weight in WEIGHTS.items()]


@pytest.fixture(scope="module")
def made(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root, base = tmp_path_factory.mktemp("loras"), tiny_llama.fp32
    settings: dict[str, dict[str, Any]] = {
        "one": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 6},
        "two": {"target_modules": ["q_proj", "down_proj", "up_proj"], "use_rslora": True},
        "three": {"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 12}},
    }
    folders = {
        name: peft_adapters.save(base, root / name, LoraConfig(r=4, **options), seed=number)
        for number, (name, options) in enumerate(settings.items())
    }
    model: Any = PeftModel.from_pretrained(tiny.load(base), str(folders["one"]), adapter_name="one")
    for name in ("two", "three"):
        model.load_adapter(str(folders[name]), adapter_name=name)
    return Made(base, folders, model)


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """What an adapter in a PEFT model adds to each layer that it adapts."""
    return {
        module: layer.get_delta_weight(name).detach()
        for module, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight") and name in layer.scaling
    }


def read(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The deltas of a folder, as PEFT loads it."""
    model: Any = PeftModel.from_pretrained(tiny.load(base), str(folder), adapter_name="made")
    return deltas(model, "made")


def close(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> bool:
    largest = max(float(delta.abs().max()) for delta in truth.values())
    assert largest > 0.005 and found.keys() == truth.keys()
    return all(float((found[name] - truth[name]).abs().max()) < TOLERANCE * largest for name in truth)


def asked_of(kind: str, density: float = 0.5) -> Combination:
    """The kind with what it needs, and DARE keeping all, so that nothing is left to chance."""
    asked = Combination(kind)
    return Combination(kind, (1.0 if asked.is_random else density) if asked.prunes else None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_makes_of_lora_adapters(kind: str, made: Made, tmp_path: Path) -> None:
    asked = asked_of(kind)
    result = combine(made.base, made.weighted, tmp_path / "out", asked)
    options = {"combination_type": kind, "density": asked.density}
    made.model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), f"mixed-{kind}", **options)
    assert close(read(made.base, result.folder), deltas(made.model, f"mixed-{kind}"))
    assert result.rank == (12 if kind == "cat" else 4) and result.layers == 8
    assert (result.error is None) == (not kind.endswith("svd"))
    assert result.from_sum is not None and (result.from_sum > 0.01) == (kind != "cat")


def test_the_sign_of_most_adapters(made: Made, tmp_path: Path) -> None:
    asked = Combination("ties_svd", 0.3, "frequency", rank=6)
    result = combine(made.base, made.weighted, tmp_path / "out", asked)
    made.model.add_weighted_adapter(
        list(WEIGHTS),
        list(WEIGHTS.values()),
        "by-frequency",
        combination_type="ties_svd",
        density=0.3,
        majority_sign_method="frequency",
        svd_rank=6,
    )
    truth = deltas(made.model, "by-frequency")
    assert close(read(made.base, result.folder), truth)
    total = combine(made.base, made.weighted, tmp_path / "total", Combination("ties_svd", 0.3, rank=6))
    assert not close(read(made.base, total.folder), truth)


def test_errors_are_those_of_the_singular_values_left_out(made: Made, tmp_path: Path) -> None:
    result = combine(made.base, made.weighted, tmp_path / "out", Combination("svd", rank=3))
    parts = {name: deltas(made.model, name) for name in WEIGHTS}
    lost, whole = 0.0, 0.0
    for module in result.layer_errors:
        total = sum(weight * parts[name][module] for name, weight in WEIGHTS.items() if module in parts[name])
        values = torch.linalg.svdvals(torch.as_tensor(total).double())
        share = float(values[3:].norm() / values.norm())
        assert result.layer_errors[module] == pytest.approx(share, abs=1e-5)
        lost, whole = lost + float(values[3:].square().sum()), whole + float(values.square().sum())
    assert result.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4) == result.from_sum


@pytest.mark.parametrize("shape", [(300, 200), (40,)])
def test_dare_keeps_its_share_and_scales_it_up(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(1)
    one, two = (draw.standard_normal(shape).astype(np.float32) for _ in range(2))
    asked, nothing = Combination("dare_linear", 0.25, seed=3), np.zeros(shape, np.float32)
    kept = combined([one, nothing], [1.0, 1.0], asked, "x"), combined([nothing, two], [1.0, 1.0], asked, "x")
    for tensor, pruned in zip((one, two), kept, strict=True):
        chosen = pruned != 0
        assert np.array_equal(pruned[chosen], (tensor / np.float32(0.25))[chosen])
        # Four standard deviations of a binomial share.
        assert abs(chosen.mean() - 0.25) < 4 * (0.25 * 0.75 / chosen.size) ** 0.5
    assert not np.array_equal(kept[0] != 0, kept[1] != 0)
    pair, weights = [torch.from_numpy(array) for array in kept], torch.tensor([0.7, -0.4])
    ties = combined([one, two], [0.7, -0.4], Combination("dare_ties", 0.25, seed=3), "x")
    assert np.allclose(ties, merge_utils.ties(pair, weights, density=1.0), atol=1e-6)
    linear = combined([one, two], [0.7, -0.4], asked, "x")
    assert np.allclose(linear, merge_utils.task_arithmetic(pair, weights), atol=1e-6)
    again = combined([one, two], [0.7, -0.4], Combination("dare_linear", 0.25, seed=4), "x")
    assert not np.array_equal(again, linear)


@pytest.fixture(scope="module")
def veras(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """VeRA adapters on one base; two share their projections, the last one's rank is another too."""
    root = tmp_path_factory.mktemp("veras")
    options = {"first": (7, 8), "second": (7, 8), "apart": (9, 4)}
    return {
        name: peft_adapters.save(
            tiny_llama.fp32,
            root / name,
            VeraConfig(
                r=rank,
                projection_prng_key=seed,
                target_modules=["q_proj", "down_proj"],
                save_projection=False,
            ),
            seed=number,
        )
        for number, (name, (seed, rank)) in enumerate(options.items())
    }


def summed(base: Path, folders: Mapping[Path, float]) -> dict[str, torch.Tensor]:
    """The weighted sum of what PEFT has each VeRA adapter add."""
    total: dict[str, torch.Tensor] = {}
    for folder, weight in folders.items():
        model: Any = PeftModel.from_pretrained(tiny.load(base), str(folder), adapter_name="made")
        for module, layer in model.base_model.model.named_modules():
            if hasattr(layer, "vera_lambda_d"):
                total[module] = total.get(module, 0) + weight * layer.get_delta_weight("made").detach()
    return total


@pytest.mark.parametrize(("other", "rank"), [("second", 8), ("apart", 12)])
def test_the_sum_of_vera_adapters_is_a_lora(
    other: str, rank: int, veras: dict[str, Path], tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    weighted = {veras["first"]: 0.7, veras[other]: -0.4}
    result = combine(tiny_llama.fp32, list(weighted.items()), tmp_path / "out")
    # With one A the sum needs no higher rank than one adapter's.
    assert (result.method, result.rank, result.error, result.from_sum) == ("LORA", rank, None, 0.0)
    assert close(read(tiny_llama.fp32, result.folder), summed(tiny_llama.fp32, weighted))


@pytest.mark.parametrize("kind", ON_FACTORS)
def test_vera_adapters_that_share_projections_stay_vera(
    kind: str, veras: dict[str, Path], tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    base = tiny_llama.fp32
    weighted = [(veras["first"], 0.7), (veras["second"], 0.4)]
    result = combine(base, weighted, tmp_path / "out", asked_of(kind))
    assert result.method == "VERA" and result.layers == 4
    found = summed(base, {result.folder: 1.0})
    if kind in ("linear", "dare_linear"):  # which PEFT says of the factors written out
        model: Any = None
        for name, (folder, _) in zip("ab", weighted, strict=True):
            lora = to_lora(folder, tmp_path / name, base).folder
            if model is None:
                model = PeftModel.from_pretrained(tiny.load(base), str(lora), adapter_name=name)
            else:
                model.load_adapter(str(lora), adapter_name=name)
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "mixed", combination_type="linear")
        assert close(found, deltas(model, "mixed"))
    assert result.from_sum is not None and result.from_sum > 0.05
    assert result.size < 4000 < to_lora(veras["first"], tmp_path / "lora", base).size


def test_methods_that_make_another_weight_are_combined_by_their_deltas(
    made: Made, veras: dict[str, Path], tmp_path: Path
) -> None:
    settings = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    scaled = peft_adapters.save(made.base, tmp_path / "ia3", settings)
    adapters = [(scaled, 0.5), (made.folders["one"], 1.5), (veras["first"], -1.0)]
    result = combine(made.base, adapters, tmp_path / "out", Combination("svd", rank=64))
    truth = summed(made.base, {veras["first"]: -1.0})
    for name, delta in deltas(made.model, "one").items():
        truth[name] = truth.get(name, 0) + 1.5 * delta
    before = {name: layer.weight for name, layer in tiny.load(made.base).named_modules() if name in truth}
    merged: Any = PeftModel.from_pretrained(tiny.load(made.base), str(scaled))
    for name, layer in merged.merge_and_unload().named_modules():
        if name in truth and name.endswith(("q_proj", "down_proj")):
            truth[name] = truth[name] + 0.5 * (layer.weight - before[name]).detach()
    assert close(read(made.base, result.folder), truth)
    with pytest.raises(PlanError, match=r"ia3 \(IA3\) has no rank to go by"):
        combine(made.base, adapters, tmp_path / "none", Combination("svd"))
    with pytest.raises(PlanError, match="no factors for dare_linear; take dare_linear_svd"):
        combine(made.base, adapters, tmp_path / "none", Combination("dare_linear", 0.5))
    assert not (tmp_path / "none").exists()


def test_the_command_says_how_far_it_is_from_the_sum(made: Made, tmp_path: Path, cli: Cli) -> None:
    words = [f"{made.folders[name]}={weight}" for name, weight in WEIGHTS.items()]
    options = ["--base", made.base, "--combination", "ties", "--density", 0.5]
    plain = cli("adapter", "combine", *words, "-o", tmp_path / "mixed", *options)
    assert plain.exit_code == 0 and "away from the weighted sum of the deltas" in plain.stdout
    told = json.loads(
        cli("adapter", "combine", *words, "-o", tmp_path / "mixed", *options, "--force", "--json").stdout
    )
    assert (told["method"], told["rank"], told["layers"]) == ("LORA", 4, 8) and told["from_sum"] > 0.01
    record = json.loads((tmp_path / "mixed" / "combination.json").read_text())
    assert [one["weight"] for one in record["adapters"]] == list(WEIGHTS.values())
    assert record["combination"] == {"kind": "ties", "density": 0.5}
    # A folder like any other: the merge takes it.
    merged = merging.to_folder(made.base, [(tmp_path / "mixed", 1.0)], tmp_path / "merged", "fp32")
    assert len(merged.layers) == 8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties_svd"])
def test_weights_beyond_float32(kind: str, made: Made, veras: dict[str, Path], tmp_path: Path) -> None:
    pairs = [(made.folders["one"], 1e39), (made.folders["three"], 1.0)]
    with pytest.raises(AdapterError, match="beyond float32"):
        combine(made.base, pairs, tmp_path / "out", asked_of(kind))
    if kind == "linear":
        with pytest.raises(AdapterError, match="beyond float32"):
            combine(
                made.base, [(veras["first"], 1e80), (veras["second"], 1.0)], tmp_path / "out", asked_of(kind)
            )
    assert not (tmp_path / "out").exists()


def test_what_was_trained_with_goes_along(made: Made, tmp_path: Path) -> None:
    one = shutil.copytree(made.folders["one"], tmp_path / "one")
    (one / "chat_template.jinja").write_text("{{ messages[0].content }}")
    both = combine(made.base, [(one, 1.0), (made.folders["two"], 1.0)], tmp_path / "out").folder
    assert (both / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert not (both / "tokenizer.json").exists()  # which is the base's
    cut = to_lora(one, tmp_path / "cut", made.base, rank=2).folder
    assert (cut / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Combination("mean"), "'mean' isn't known; choose from cat"),
        (Combination("ties"), "ties needs a density"),
        (Combination("ties", 1.5), "density is 1.5; it must be above 0 and at most 1"),
        (Combination("linear", 0.5), "linear takes no density"),
        (Combination("ties", 0.5, "mean"), "choose total or frequency"),
        (Combination("dare_linear", 0.5, "total"), "dare_linear takes no majority sign"),
        (Combination("cat", rank=8), "cat takes no rank"),
        (Combination("svd", rank=0), "rank is 0"),
        (Combination("ties", 0.5, seed=1), "ties takes no seed"),
    ],
)
def test_what_cant_be_asked(asked: Combination, message: str, made: Made, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        combine(made.base, made.weighted, tmp_path / "out", asked)


def test_what_cant_be_combined(made: Made, tmp_path: Path, tiny_gpt2: Path) -> None:
    base, out, one = made.base, tmp_path / "out", made.folders["one"]
    with pytest.raises(PlanError, match="two adapters or more"):
        combine(base, [(one, 1.0)], out)
    with pytest.raises(PlanError, match="give a finite number"):
        combine(base, [(one, 1.0), (made.folders["two"], float("nan"))], out)
    other = peft_adapters.save(base, tmp_path / "r2", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(MismatchError, match="have ranks 4, 2; take cat or svd"):
        combine(base, [(one, 1.0), (other, 1.0)], out, Combination("linear"))
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    whole = [peft_adapters.save(base, tmp_path / name, settings) for name in ("norm", "norm-too")]
    with pytest.raises(PlanError, match=r"replaces whole tensors \(model.norm.weight\)"):
        combine(base, [(one, 1.0), (whole[0], 0.5)], out)
    with pytest.raises(MismatchError, match=r"both replace model\.norm\.weight"):
        combine(base, [(folder, 1.0) for folder in whole], out)
    kept = combine(base, [(one, 0.5), (whole[0], 1.0)], out)
    merged = merging.to_folder(base, [(kept.folder, 1.0)], tmp_path / "merged", "fp32")
    truth = peft_adapters.unmerged(tiny.load(base), whole[0]).base_model.model.model.norm
    truth = truth.modules_to_save["default"].weight
    assert torch.equal(tiny.load(merged.folder).model.norm.weight, truth)
    with pytest.raises(OutputError, match="--force"):
        combine(base, made.weighted, out)
    settings = LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    biased = peft_adapters.save(tiny_gpt2, tmp_path / "biased", settings)
    with pytest.raises(PlanError, match="ties doesn't take them; choose cat, svd or linear"):
        combine(tiny_gpt2, [(biased, 1.0), (biased, 1.0)], tmp_path / "none", Combination("ties", 0.5))


@pytest.mark.parametrize("cls", [LoraConfig, VeraConfig])
def test_trained_biases_are_summed_as_the_deltas_are(cls: Any, tmp_path: Path, tiny_gpt2: Path) -> None:
    folders = {}
    for seed, (name, modules) in enumerate({"one": ["c_attn", "c_fc"], "two": ["c_attn"]}.items()):
        settings = cls(r=4, target_modules=modules, bias="all", fan_in_fan_out=True)
        folders[name] = peft_adapters.save(tiny_gpt2, tmp_path / name, settings, seed=seed)
    weighted = [(folder, WEIGHTS[name]) for name, folder in folders.items()]
    made = combine(tiny_gpt2, weighted, tmp_path / "out")
    truth = tiny.load(tiny_gpt2)
    base = {name: value.clone() for name, value in truth.state_dict().items()}
    with torch.no_grad():
        for folder, weight in weighted:
            merged = peft_adapters.unmerged(tiny.load(tiny_gpt2), folder).merge_and_unload()
            for name, value in truth.state_dict().items():
                value += weight * (merged.state_dict()[name] - base[name])
    found = peft_adapters.logits(peft_adapters.unmerged(tiny.load(tiny_gpt2), made.folder))
    assert peft_adapters.close(found, peft_adapters.logits(truth))
    merged = merging.to_folder(tiny_gpt2, [(made.folder, 1.0)], tmp_path / "merged", "fp32")
    assert peft_adapters.close(peft_adapters.logits(tiny.load(merged.folder)), peft_adapters.logits(truth))
    linear = combine(tiny_gpt2, weighted, tmp_path / "linear", Combination("linear"))
    for name, bias in load_file(made.folder / WEIGHTS_FILE).items():
        if name.endswith(".bias"):
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.allclose(torch.from_numpy(bias), truth.state_dict()[plain], atol=1e-6)
            assert np.array_equal(load_file(linear.folder / WEIGHTS_FILE)[name], bias)


def test_factors_of_ia3_are_pefts_own_sum_and_stay_ia3(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama.fp32
    settings = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    weights = {"one": 0.7, "two": -0.4}
    folders = {
        name: peft_adapters.save(base, tmp_path / name, settings, seed=number)
        for number, name in enumerate(weights)
    }
    model: Any = PeftModel.from_pretrained(tiny.load(base), str(folders["one"]), adapter_name="one")
    model.load_adapter(str(folders["two"]), adapter_name="two")
    model.add_weighted_adapter(list(weights), list(weights.values()), "mixed")
    model.set_adapter("mixed")
    given = [(folders[name], weight) for name, weight in weights.items()]
    result = combine(base, given, tmp_path / "out", Combination("linear"))
    made = peft_adapters.unmerged(tiny.load(base), result.folder)
    assert peft_adapters.close(peft_adapters.logits(made), peft_adapters.logits(model))
    assert result.method == "IA3" and result.from_sum is not None and result.from_sum > 0.5
    even = combine(
        base, [(folders["one"], 0.3), (folders["two"], 0.7)], tmp_path / "even", Combination("linear")
    )
    assert even.from_sum is not None and even.from_sum < 1e-6  # the weights' sum is 1: the sum of the changes
    other = peft_adapters.save(
        base, tmp_path / "other", IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(MismatchError, match=r"doesn't scale .*down_proj as"):
        combine(base, [given[0], (other, 1.0)], tmp_path / "refused", Combination("linear"))
    assert not (tmp_path / "refused").exists()
