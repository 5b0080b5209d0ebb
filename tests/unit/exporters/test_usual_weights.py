"""What an export's weights are where nobody asks, and what it says of that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vera_edge
from tests import tiny, tiny_encoder
from tests.conftest import Cli
from vera_edge.errors import PlanError
from vera_edge.plans import plan as plans
from vera_edge.trained.trained_model import open_model
from vera_edge_onnx import usual_weights


@pytest.mark.parametrize(
    ("base", "merged", "branch"),
    [
        ("fp32", "int8", "int8"),
        ("bf16", "int8", "int8"),
        ("nf4", "int8", "nf4"),
        ("fp4", "int8", "fp4"),
        ("int8", "int8", "same"),
    ],
)
def test_merged_it_is_int8_and_a_branch_keeps_the_integers_that_the_base_has(
    base: str, merged: str, branch: str, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    folder = getattr(tiny_llama, base)
    adapter = tiny.make_adapter(folder, tmp_path / "adapter")
    model = open_model(folder, [(adapter, 1.0)], "float32")
    assert usual_weights.usual(model, "merged", {}) == merged
    assert usual_weights.usual(model, "branch", {}) == branch
    for option in ("block", "symmetric", "activations", "accuracy_level"):
        assert usual_weights.usual(model, "branch", {option: "?"}) == "int8"
    four_bit = "fp4" if base == "fp4" else "nf4"
    assert usual_weights.usual(model, "merged", {"run": "int8"}) == four_bit


def test_a_base_in_a_format_that_no_graph_holds_becomes_int8(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    vera_edge.merge(tiny_llama.fp32, adapter, out=tmp_path / "fp8", to="fp8", projection_rounding="float32")
    model = open_model(tmp_path / "fp8", [(adapter, 1.0)], "float32")
    assert {step.source for step in plans.plan_model(model).steps} == {"fp8"}
    assert usual_weights.usual(model, "branch", {}) == "int8"


def _sizes(note: str) -> list[float]:
    return [float(found) for found in re.findall(r"about ([\d.,]+) MB", note)]


def test_one_line_says_what_was_chosen_and_what_others_give(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    made = cli("export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out")
    assert made.exit_code == 0 and "merged, int8 weights" in made.stdout, made.output
    (line,) = [line for line in made.stdout.splitlines() if "wasn't given" in line]
    assert line.startswith("int8 weights") and "99 % of the adapter's effect" in line
    assert "--weights int4: about" in line and "--mode branch: about" in line and "vera-edge plan" in line
    asked = (("merged", None), ("merged", "int4"), ("branch", None))
    for size, (mode, weights) in zip(_sizes(line), asked, strict=True):
        cost = vera_edge.plan_export(tiny_llama.nf4, tiny_adapter, mode=mode, weights=weights).cost
        assert size == pytest.approx(cost.size / 1e6, abs=0.06)
    given = cli(
        "export", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "two", "--weights", "int8", "--dry-run"
    )
    assert given.exit_code == 0 and "wasn't given" not in given.output


def test_an_adapter_that_can_only_be_merged_is_offered_no_branch(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    import peft

    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    peft.get_peft_model(tiny.load(tiny_llama.nf4), config).save_pretrained(tmp_path / "oft")
    for device in (None, "laptop-8gb"):
        planned = vera_edge.plan_export(tiny_llama.nf4, tmp_path / "oft", device=device)
        assert (planned.plan.mode, planned.plan.weights) == ("merged", "int8")
        assert not any("--mode branch" in note for note in planned.notes)


def test_an_encoder_is_told_no_share_that_was_measured_on_a_decoder(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    planned = vera_edge.plan_export(base, adapter)
    assert planned.plan.weights == "int8"
    (line,) = [line for line in planned.notes if "wasn't given" in line]
    assert "%" not in line and "--weights int4: about" in line


def test_what_speaks_of_other_weights_is_refused_as_before(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="a merged export holds no projections"):
        vera_edge.export(tiny_llama.nf4, tiny_adapter, out=tmp_path / "out", store_projections="int8")
    with pytest.raises(PlanError, match="choose from float, dynamic, static"):
        vera_edge.export(tiny_llama.nf4, tiny_adapter, out=tmp_path / "out", activations="some")
    assert not (tmp_path / "out").exists()


def test_gguf_is_q8_0(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    made = vera_edge.export(tiny_llama.nf4, tiny_adapter, out=tmp_path / "out", target="gguf")
    assert made.plan.weights == "q8_0"
    assert any("q4_k_m takes about 4.8" in note for note in made.notes)
