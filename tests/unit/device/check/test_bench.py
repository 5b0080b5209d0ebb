"""What bench says is complete and makes sense; how fast this machine is, no test asserts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from tests import foreign_code, tiny_bundle
from tests.conftest import Cli
from tests.tiny_bundle import TinyBundles
from vera_edge.device.check.bench import FIGURES, bench, ratio_of_medians
from vera_edge.device.check.energy import EnergyMeter
from vera_edge.errors import BundleError, DataError


def test_two_bundles_are_measured_in_turn_and_compared(tiny_bundles: TinyBundles, cli: Cli) -> None:
    words = ["--against", tiny_bundles.branch, "--threads", "1,2", "--rounds", 2, "--prompt", 20, "--new", 5]
    result = cli("bench", tiny_bundles.fp32, *words, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    rows = value["measured"]
    folders = [str(tiny_bundles.fp32), str(tiny_bundles.branch)]
    assert [(row["bundle"], row["threads"]) for row in rows] == [(f, n) for n in (1, 2) for f in folders]
    for row in rows:
        assert {"load", "first_token", "prefill", "decode", "peak_rss"} <= set(row["figures"]) <= set(FIGURES)
        for spread in row["figures"].values():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"] < math.inf
        assert 0 < row["token_ms"]["50"] <= row["token_ms"]["95"] <= row["token_ms"]["99"]
        assert row["figures"]["peak_rss"]["low"] > 10e6
    assert {(one["threads"], one["figure"]) for one in value["ratios"]} >= {(1, "decode"), (2, "prefill")}
    for one in value["ratios"]:
        assert 0 < one["low"] <= one["ratio"] <= one["high"]
    assert (value["rounds"], value["prompt"], value["new"]) == (2, 20, 5) and value["device"]["processor"]


def test_the_table_names_every_figure(tiny_bundles: TinyBundles, cli: Cli) -> None:
    words = ("--rounds", 1, "--prompt", 4, "--new", 2, "--resident")
    result = cli("bench", tiny_bundles.branch, *words)
    assert result.exit_code == 0, result.stderr
    for word in (
        "load",
        "first token",
        "prefill",
        "decode",
        "peak memory",
        "one token",
        "1 rounds, adapter resident",
    ):
        assert word in result.stdout


@pytest.mark.parametrize("words", [("--threads", "1,x"), ("--threads", "0"), ("--rounds", 0), ("--new", 1)])
def test_numbers_that_make_no_sense_are_refused(
    words: tuple[object, ...], tiny_bundles: TinyBundles, cli: Cli
) -> None:
    assert cli("bench", tiny_bundles.fp32, *words).exit_code == 2


def test_what_cannot_be_measured_gets_one_sentence(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 or more new tokens"):
        bench(tiny_bundles.fp32, new=1)
    with pytest.raises(BundleError, match="300 tokens and 64 more don't fit the context of 256"):
        bench(tiny_bundles.fp32, prompt=300, rounds=1)
    with pytest.raises(BundleError, match="has its adapter merged"):
        bench(tiny_bundles.fp32, resident=True, rounds=1)
    with pytest.raises(BundleError, match="isn't a folder"):
        bench(tiny_bundles.fp32, against=tmp_path / "none")


def test_a_round_runs_nothing_of_the_bundle_that_it_is_started_in(
    tiny_bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "bundle")
    foreign_code.plant(folder, tmp_path / "marks")
    tiny_bundle.rewrite(folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert bench(Path(), rounds=1, prompt=2, new=2).measured
    assert foreign_code.marks_in(tmp_path / "marks") == []


def test_the_ratio_and_its_interval() -> None:
    same = [3.0, 4.0, 5.0, 6.0, 7.0]
    assert ratio_of_medians(same, same) == (1.0, 1.0, 1.0)  # pairs are resampled together
    ratio, low, high = ratio_of_medians([2 * value for value in same], same)
    assert (ratio, low, high) == (2.0, 2.0, 2.0)
    ratio, low, high = ratio_of_medians([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    assert ratio == 1.0 and low < 0.7 and high > 1.4


def test_energy_adds_packages_and_survives_a_counter_that_wraps(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "none").joules() is None
    for name, energy in (("intel-rapl:0", 900), ("intel-rapl:1", 100), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("400\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("999\n")
    assert meter.joules() == pytest.approx(450e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None


@pytest.mark.parametrize(
    ("products", "said"),
    [
        *((name, f"'{name}'") for name in ("int3", "int8:24", "int4:512", "nf4:32", "fp32:32", "int4:x")),
        ("int4,int4:32", "more than once"),
        ("int4", "doesn't say the shapes"),
    ],
)
def test_products_that_cannot_be_timed_are_refused(
    products: str, said: str, tiny_bundles: TinyBundles, cli: Cli
) -> None:
    result = cli("bench", tiny_bundles.fp32, "--products", products)
    assert result.exit_code == 2 and said in result.stderr
