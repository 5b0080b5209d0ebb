"""The adapter in examples/adapter is what scripts/demo_training.py makes: recipe, first steps, effect."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import pytest
from safetensors import safe_open

from scripts.demo_text import split
from scripts.demo_training import LINEARS, Recipe, first_losses, held_out_losses
from scripts.prepare_demo import ADAPTER, Demo

pytestmark = pytest.mark.real
RECORD = json.loads((ADAPTER / "training.json").read_text())
# Another processor sums in another order, and a step of training makes more of that. Another Python brings
# another text: some pages, and with them windows, aren't those of the record.
SAME_TEXT = RECORD["text_sha256"] == split().digest
STEPS, TOLERANCE = 2, 0.05 if SAME_TEXT else 0.4
EVERY = 8  # of the 24 held-out windows that the record is of


def test_the_shipped_adapter_is_of_todays_recipe(demo: Demo) -> None:
    assert {key: RECORD[key] for key in asdict(Recipe())} == asdict(Recipe())
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["r"] == Recipe().rank and config["projection_prng_key"] == Recipe().seed
    assert set(config["target_modules"]) == set(LINEARS)
    assert config["base_model_name_or_path"] == demo.base.name
    with safe_open(str(ADAPTER / "adapter_model.safetensors"), "numpy") as tensors:
        assert len(tensors.keys()) == 2 * 30 * len(LINEARS)
    assert "license: apache-2.0" in (ADAPTER / "README.md").read_text()


def test_the_script_trains_it_from_the_first_step_on(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.folder)
    losses = first_losses(Path(demo.base.name), replace(Recipe(), threads=1), STEPS)
    assert losses == pytest.approx(RECORD["first_losses"][:STEPS], abs=TOLERANCE)


def test_it_does_on_held_out_text_what_its_record_says(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.folder)
    measured = held_out_losses(Path(demo.base.name), demo.adapter, Recipe(), EVERY)
    recorded = RECORD["held_out_losses"][::EVERY]
    if SAME_TEXT:
        assert measured == pytest.approx(recorded, abs=0.01)
    assert fmean(measured) == pytest.approx(fmean(recorded), abs=TOLERANCE)
    assert len(RECORD["held_out_losses"]) == Recipe().judged
    assert RECORD["held_out_perplexity_adapter"] < 0.7 * RECORD["held_out_perplexity_base"]
