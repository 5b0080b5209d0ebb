"""Readers of what a person writes or an earlier run wrote: plans, recipes, limits, drift reports."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from tests.fuzzing import bases, graphs
from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge.adapters import reading
from vera_edge.adapters.adapter import WeightedAdapter
from vera_edge.adapters.projection import Projections, ProjectionSpec
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.measuring import baseline, limits
from vera_edge.measuring.aggregate import Aggregate
from vera_edge.measuring.metrics import compare
from vera_edge.measuring.result import Artefact, DriftReport, TextFacts, Verdict
from vera_edge.merging.config import merged_config
from vera_edge.plans import plan as plans
from vera_edge.plans import step_options
from vera_edge.releasing import recipe
from vera_edge.trained.trained_model import TrainedModel

ADAPTER = Path(__file__).parents[1] / "golden/adapters/peft-0.21.2/saved-fp32"


@cache
def _planned(mode: str) -> tuple[plans.Plan, TrainedModel]:
    """A plan, and what it was made for."""
    base = graphs.scratch() / f"base-{mode}"
    checkpoint, adapter = Checkpoint.open(bases.write_base(base)), reading.read(ADAPTER)
    assert adapter.saved is not None
    spec = ProjectionSpec(adapter.seed, adapter.rank, adapter.saved[0].shape[1], adapter.saved[1].shape[0])
    projections = Projections(spec, *adapter.saved)
    weights = "nf4" if mode == "merged" else "same"
    model = TrainedModel(checkpoint, (WeightedAdapter(adapter, 1.0),), projections)
    return plans.make(checkpoint, model.adapters, mode, weights, None, projections), model


def _plan() -> Target:
    def read(seed: Seed, folder: Path) -> object:
        (folder / "plan.json").write_bytes(seed.data)
        plan = plans.read(folder / "plan.json")
        _, model = _planned(plan.mode)
        plans.check_made_for(plan, model)
        step_options.check(plan, model.checkpoint, graph=plan.mode == "branch")
        _ = [(step.activations, step.copies) for step in plan.steps]
        return plan.to_dict(), plan.mode == "merged" and merged_config(plan, model.checkpoint, untied=False)

    def seeds() -> list[Seed]:
        found = []
        for mode in ("merged", "branch"):
            value = _planned(mode)[0].to_dict()
            found.append(Seed(json.dumps(value).encode()))
        return found

    return Target("plan", Form.JSON, seeds, read)


_RECIPE = """\
[release]
name = "tiny"
version = "1.0"
golden = true

[[base]]
id = "tiny"
path = "base"
licence = "Apache-2.0"
trained_as = "nf4"

[[adapter]]
id = "a"
base = "tiny"
path = "adapters/a"
projection_dtype = "float32"

[[adapter]]
id = "mixed"
base = "tiny"
combine = [{ path = "adapters/a", weight = 0.7 }, { path = "adapters/b" }]
combination = "dare_ties_svd"
density = 0.5
majority_sign = "frequency"
rank = 16
seed = 1

[[variant]]
target = "onnx"
mode = "branch"
weights = "int8"
projections = "seed"
vectors = "fp16"
adapters = ["a"]

[[variant]]
id = "planned"
weights = "plan"
max_size = "130MB"
formats = ["int4", "int8"]

[limits]
data = "eval.txt"
max_kl = 0.05
min_top1 = 0.9
tokens = 4096
window = 256

[sign]
key = "publisher.key"
public_key = "publisher.pem"
chain = ["a.pem"]
"""
_TOML = (
    "[", "[[", "]]", "=", '"""', "''", "true", "false", "inf", "-inf", "nan", "1979-05-27", "07:32:00",
    "{}", "base", "adapter", "variant", "limits", "\n", "0x10", "1_000", "-0.0", "'x'", "a.b",
)  # fmt: skip


def _recipe() -> Target:
    def read(seed: Seed, folder: Path) -> object:
        (folder / "r.toml").write_bytes(seed.data)
        found = recipe.read(folder / "r.toml")
        for base in found.file.base:
            _ = found.path(base.path), base.spec
        return (
            found.signer,
            found.trust,
            found.file.limits.bounds,
            found.text(found.file.limits.data),
            found.jobs,
        )

    return Target("recipe", Form.TOML, lambda: [Seed(_RECIPE.encode())], read, words=_TOML)


def _limits() -> Target:
    text = b"[limits]\nmax_kl = 0.01\nmin_top1 = 0.98\nmax_kl_p99 = 1\nmin_retained = 0.9\n"

    def read(seed: Seed, folder: Path) -> object:
        (folder / "drift.toml").write_bytes(seed.data)
        return limits.gather(folder / "drift.toml", {})

    words = (*_TOML, *limits.METRICS)
    return Target("limits", Form.TOML, lambda: [Seed(text)], read, words=words)


def _baseline() -> Target:
    """A report as JSON, and held against it what was measured now."""

    def read(seed: Seed, folder: Path) -> object:
        (folder / "report.json").write_bytes(seed.data)
        return baseline.hold(_report(), baseline.read(folder / "report.json")).outcomes

    def seeds() -> list[Seed]:
        return [Seed(json.dumps(_report().to_dict()).encode())]

    return Target("baseline", Form.JSON, seeds, read)


@cache
def _report() -> DriftReport:
    """What was measured of two models that differ a little."""
    draw = np.random.default_rng(8)
    aggregate = Aggregate()
    for _ in range(4):
        reference = draw.standard_normal((8, 32)).astype(np.float32)
        noise = draw.standard_normal((8, 32)).astype(np.float32) * np.float32(0.1)
        aggregate.add(compare(reference, reference + noise, draw.integers(0, 32, 8)))
    side = Artefact("a", ".", "bundle", 1000)
    facts = TextFacts("eval.txt", "0" * 64, 32, 4, 8)
    return DriftReport(
        side, side, None, facts, aggregate.finish(), None, None, None, Verdict("faithful", "It keeps all.")
    )


TARGETS = (_plan(), _recipe(), _limits(), _baseline())
