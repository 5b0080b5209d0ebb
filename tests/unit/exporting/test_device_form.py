"""The form that a device gets: which of those that fit loses least, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vera_edge
from tests import tiny, tiny_encoder
from tests.conftest import Cli
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting import device_form, device_profile
from vera_edge.exporting.device_form import Form, Reckoned, choose, forms, reckon

# Weights as SmolLM2-135M, a Llama of 1.2 billion weights and one of 8 have them, MB by form (docs/scale.md).
SIZES = {
    "135m": {"nf4": 172, "int8": 151, "int4": 98, "int4 ends": 84},
    "1.2b": {"nf4": 1700, "int8": 1390, "int4": 930, "int4 ends": 780},
    "8b": {"nf4": 6500, "int8": 9000, "int4": 5200, "int4 ends": 4700},
}
CONFIG: Mapping[str, Any] = {
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 2048,
    "max_position_embeddings": 131072,
}


def chosen(device: str, model: str, mode: str | None = "merged", own: str = "nf4") -> Reckoned:
    profile = device_profile.find(device)

    def reckoned(form: Form) -> Reckoned:
        name = "int4 ends" if form.head == "int4" else form.weights
        return reckon(form, SIZES[model][name] * 10**6, CONFIG, profile.stream, True)

    return choose(forms(mode, own), reckoned, profile.memory)


def test_a_small_model_is_int8_where_int8_is_quick() -> None:
    assert chosen("pi5-4gb", "135m").form == Form("merged", "int8")
    assert chosen("laptop-8gb", "1.2b").form == Form("merged", "int8")


def test_what_is_slow_in_any_form_gets_the_quickest() -> None:
    """1.2 billion weights on a Raspberry Pi 5: 1.39 GB a token at 8.5 GB/s is 6 tokens/s."""
    found = chosen("pi5-4gb", "1.2b")
    assert 5 < found.speed < device_form.QUICK
    assert found.speed == max(
        reckon(form, SIZES["1.2b"][name] * 10**6, CONFIG, 8.5e9, True).speed
        for form, name in zip(forms("merged", "int8"), ("int8", "int4", "int4 ends"), strict=True)
    )


def test_the_exact_branch_is_taken_where_it_is_quick_and_a_branch_only_where_one_may_be() -> None:
    assert chosen("laptop-16gb", "135m", None).form == Form("branch", "nf4")
    assert chosen("pi5-4gb", "135m", None).form == Form("merged", "int8")
    assert chosen("pi5-4gb", "135m", "branch", "int8").form == Form("branch", "int8")
    assert [form.mode for form in forms("branch", "same")] == ["branch"] * 4


def test_a_model_that_fits_in_no_form_is_refused_with_the_smallest() -> None:
    with pytest.raises(
        PlanError, match=r"smallest form \(merged, int4 weights, int4 head\).* 3\.20 GB for it"
    ):
        chosen("pi5-4gb", "8b")


def test_a_form_that_cannot_be_stored_is_passed_over() -> None:
    four = Reckoned(Form("merged", "int4"), 10, 0.0)
    assert choose(forms("merged", "int8"), {four.form: four}.get, 10) is four
    with pytest.raises(PlanError, match="in any form"):
        choose(forms("merged", "int8"), lambda form: None, 10)


@settings(deadline=None)  # on a machine that may be busy
@given(st.integers(10**6, 10**11), st.floats(1e8, 1e12), st.integers(10**7, 10**11))
def test_what_is_chosen_fits_and_nothing_that_loses_less_would_do(
    size: int, stream: float, memory: int
) -> None:
    shares = (1.2, 1.0, 0.65, 0.6)
    known = [
        reckon(form, int(size * share), CONFIG, stream, True)
        for form, share in zip(forms(None, "nf4"), shares, strict=True)
    ]
    by_form = {one.form: one for one in known}
    fits = [one for one in known if one.memory <= memory]
    if not fits:
        with pytest.raises(PlanError, match="doesn't fit"):
            choose(forms(None, "nf4"), by_form.get, memory)
        return
    found = choose(forms(None, "nf4"), by_form.get, memory)
    better = known[: known.index(found)]
    assert found in fits
    if found.speed >= device_form.QUICK:
        assert all(one not in fits or one.speed < device_form.QUICK for one in better)
    else:
        assert found.speed == max(one.speed for one in fits)


def test_the_cache_is_that_of_float32_keys_and_values() -> None:
    assert device_form.cache_bytes(CONFIG) == 16 * 2 * 8 * 64 * 2048 * 4
    assert device_form.cache_bytes({"hidden_size": 64}) == 0


@pytest.mark.parametrize("name", device_profile.names())
def test_a_profile_says_where_it_is_from_and_what_is_reckoned(name: str) -> None:
    profile = device_profile.find(name)
    assert 2e9 < profile.memory < 16e9 and 5e9 < profile.stream < 50e9
    assert "reckoned" in profile.source and "GB/s" in profile.source


def _bench(**change: Any) -> dict[str, Any]:
    row = {"figures": {"decode": {"median": 20.0}}, "size": 10**8, "mode": "merged", "weights": "int4"}
    return {"device": {"memory": 5 * 10**9, "processor": "Z80"}, "measured": [row | change]}


def test_a_file_of_bench_is_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(_bench()))
    found = device_profile.find(str(file))
    assert (found.name, found.memory) == ("mine.json", 4 * 10**9)
    assert found.stream == pytest.approx(20 * 10**8 / Form("merged", "int4").efficiency)
    assert "Z80" in found.source


@pytest.mark.parametrize(
    "told",
    [{}, _bench(size="much"), _bench(size=-1), _bench(figures={}), _bench() | {"device": {"memory": None}}],
)
def test_a_file_that_does_not_tell_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(told))
    with pytest.raises(PlanError, match="measure again on the device"):
        device_profile.find(str(tmp_path / "x.json"))


def test_an_export_for_a_device(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    made = cli(
        "export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out", "--mode", "merged", "--for", "pi5-4gb"
    )
    assert made.exit_code == 0, made.output
    assert "merged, int8 weights" in made.stdout and "wasn't given" not in made.stdout
    (line,) = [line for line in made.stdout.splitlines() if line.startswith("for pi5-4gb: ")]
    assert "merged, int8 weights, the form that loses least" in line and "tokens/s, all reckoned" in line
    planned = vera_edge.plan_export(tiny_llama.nf4, tiny_adapter, device="pi5-4gb")
    assert (planned.plan.mode, planned.plan.weights) == (
        "branch",
        "nf4",
    )  # so small that the exact one is quick


def test_an_encoder_is_merged_and_has_no_speed(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    planned = vera_edge.plan_export(base, adapter, device="phone-6gb")
    assert (planned.plan.mode, planned.plan.weights) == ("merged", "int8")
    (line,) = [note for note in planned.notes if note.startswith("for phone-6gb")]
    assert "tokens/s" not in line


def test_what_cannot_be_met_is_one_sentence(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    for words, says in (
        (["--for", "pi3"], "no device is called 'pi3'; choose from pi5-4gb"),
        (["--for", "pi5-4gb", "--weights", "int8"], "the device decides"),
        (["--for", "pi5-4gb", "--head", "int8"], "head is given"),
    ):
        result = cli("export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out", *words)
        assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1, (
            result.output
        )
    with pytest.raises(TargetError, match="give --weights instead of --for"):
        vera_edge.export(tiny_llama.nf4, tiny_adapter, out=tmp_path / "out", target="gguf", device="pi5-4gb")
    small = tmp_path / "small.json"
    small.write_text(json.dumps(_bench() | {"device": {"memory": 10**6}}))
    with pytest.raises(PlanError, match="the model doesn't fit"):
        vera_edge.export(tiny_llama.nf4, tiny_adapter, out=tmp_path / "out", device=small)
    assert not (tmp_path / "out").exists()
