"""A branch export stands for the model as trained only where it holds its very values, as PEFT has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import exported, tiny, tiny_bundle
from tests.conftest import Cli
from vera_edge.adapters import reading as adapters
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.errors import MismatchError, PlanError
from vera_edge.exporting import target
from vera_edge.measuring import opened_reference
from vera_edge.reference.model import open_reference
from vera_edge.trained import provenance

Bases = Callable[[str], tuple[Path, Path]]
QUICK = ("--tokens", 512, "--window", 32)


@pytest.fixture(scope="module")
def bases(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A base of the tiny Llama by its format, and an adapter that was trained on it."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def get(kind: str) -> tuple[Path, Path]:
        base: Path = getattr(tiny_llama, kind)
        if kind not in made:
            made[kind] = tiny.make_adapter(base, root / kind)
        return base, made[kind]

    return get


def export(
    bases: Bases, out: Path, base: str, weights: str, options: Mapping[str, str], weight: float = 1.0
) -> Path:
    folder, adapter = bases(base)
    target.export(folder, [(adapter, weight)], out, mode="branch", weights=weights, options=options)
    return out


def distance(bases: Bases, base: str, out: Path) -> float:
    """Mean KL from the model as trained, in PEFT's layers, to the export with its adapter on."""
    folder, adapter_folder = bases(base)
    checkpoint, adapter = Checkpoint.open(folder), adapters.read(adapter_folder)
    projections = provenance.resolve(adapter, checkpoint).projections
    ids = exported.tokens()
    trained = open_reference(checkpoint, [(adapter, 1.0)], projections)
    return exported.divergence(trained.logits(ids), Session.open(out, four_bit="kept").logits(ids))


EXACT: list[tuple[str, str, dict[str, str]]] = [
    ("nf4", "nf4", {}),
    ("nf4", "same", {}),
    ("nf4", "fp32", {}),
    ("nf4", "nf4", {"origin": "seed"}),
    ("nf4", "nf4", {"head": "fp32", "projections": "fp32", "vectors": "fp32"}),
    ("fp4", "fp4", {}),
    ("fp32", "fp32", {}),
    ("bf16", "fp32", {}),
    ("int8", "fp32", {}),
    ("int8", "same", {"head": "fp32", "projections": "fp32", "accuracy_level": "0"}),
]
ROUNDED: list[tuple[str, str, dict[str, str], str]] = [
    ("fp32", "nf4", {}, "is fp32 in the base and was quantized to nf4"),
    ("fp32", "fp4", {}, "is fp32 in the base and was quantized to fp4"),
    ("nf4", "fp4", {}, "is nf4 in the base and was quantized to fp4"),
    ("nf4", "int8", {}, "stored as int8"),
    ("nf4", "nf4", {"head": "int4"}, "its embeddings and head are stored as int4"),
    ("nf4", "nf4", {"head": "fp16"}, "its embeddings and head are stored as fp16"),
    ("nf4", "nf4", {"projections": "int4"}, "its projections are stored as int4"),
    ("fp32", "fp32", {"projections": "fp16"}, "its projections are stored as fp16"),
    ("nf4", "nf4", {"vectors": "fp16"}, "its adapter's vectors are stored as fp16"),
    ("nf4", "nf4", {"run": "int8"}, "stored as int8"),
    ("nf4", "nf4", {"run": "int8", "head": "fp32", "projections": "fp32"}, "its weights run as int8"),
    ("int8", "same", {"head": "fp32", "projections": "fp32"}, "multiplied with is rounded"),
    ("nf4", "int8", {"head": "fp32", "projections": "fp32", "accuracy_level": "0"}, "was quantized to int8"),
]


@pytest.mark.parametrize(("base", "weights", "options"), EXACT)
def test_what_is_exact_says_so_and_is_a_reference(
    bases: Bases, tmp_path: Path, base: str, weights: str, options: dict[str, str]
) -> None:
    out = export(bases, tmp_path / "out", base, weights, options)
    assert bundle.read(out).exact is True
    assert opened_reference.open_trained(out).base is not None
    assert distance(bases, base, out) < 1e-9


@pytest.mark.parametrize(("base", "weights", "options", "says"), ROUNDED)
def test_what_was_rounded_says_so_and_is_refused(
    bases: Bases, tmp_path: Path, base: str, weights: str, options: dict[str, str], says: str
) -> None:
    out = export(bases, tmp_path / "out", base, weights, options)
    assert bundle.read(out).exact is False
    with pytest.raises(MismatchError, match=f"isn't the model as trained: .*{says}"):
        opened_reference.open_trained(out)
    assert distance(bases, base, out) > 1e-9


@pytest.mark.parametrize("to", ["gptq", "awq", "w4a16"])
def test_a_base_of_integers_is_exact_only_without_rounded_inputs(
    tiny_llama: tiny.TinyLlama, bases: Bases, tmp_path: Path, cli: Cli, to: str
) -> None:
    _, adapter = bases("fp32")
    base = tmp_path / "base"
    words = ("merge", tiny_llama.fp32, adapter, "--to", to, "--method", "rtn", "--block-size", 32, "-o", base)
    assert cli(*words).exit_code == 0
    options = {"head": "fp32", "projections": "fp32"}
    for more, exact in (({"accuracy_level": "0"}, True), (dict[str, str](), False)):
        out = tmp_path / str(exact)
        pairs = [(adapter, 1.0)]
        target.export(base, pairs, out, mode="branch", weights="same", options={**options, **more},
                      projection_rounding="float32")  # fmt: skip
        assert bundle.read(out).exact is exact
        checkpoint, read = Checkpoint.open(base), adapters.read(adapter)
        projections = provenance.resolve(read, checkpoint, "float32").projections
        ids = exported.tokens()
        trained = open_reference(checkpoint, [(read, 1.0)], projections).logits(ids)
        assert (exported.divergence(trained, Session.open(out, four_bit="kept").logits(ids)) < 1e-9) is exact


def test_the_manifest_says_how_everything_beside_the_linears_is_stored(bases: Bases, tmp_path: Path) -> None:
    out = export(bases, tmp_path / "a", "nf4", "int4", {"head": "fp16", "accuracy_level": "0"})
    stored = {"head": "fp16", "projections": "int8", "vectors": "fp32", "accuracy_level": "0"}
    assert bundle.read(out).options == stored
    out = export(bases, tmp_path / "b", "nf4", "nf4", {})
    assert bundle.read(out).options == {"head": "fp32", "projections": "fp32", "vectors": "fp32"}


def test_an_adapter_at_another_weight_is_not_the_one_that_was_trained(bases: Bases, tmp_path: Path) -> None:
    out = export(bases, tmp_path / "out", "nf4", "nf4", {}, weight=0.5)
    with pytest.raises(MismatchError, match=r"default has weight 0\.5, and was trained with 1"):
        opened_reference.open_trained(out)


@pytest.mark.parametrize("plan", [True, False])
def test_an_older_manifest_is_asked_to_be_made_anew(bases: Bases, tmp_path: Path, plan: bool) -> None:
    out = export(bases, tmp_path / "out", "nf4", "nf4", {})
    tiny_bundle.rewrite(out, exact=None, options={}, plan=bundle.read(out).plan if plan else None)
    with pytest.raises(MismatchError, match="an older one, doesn't say whether all of it is exact"):
        opened_reference.open_trained(out)


@pytest.mark.parametrize(
    "words",
    [
        ("--base", "nowhere"),
        ("--adapter", "nowhere"),
        ("--adapter", "x=0.5"),
        ("--projection-rounding", "float16"),
    ],
)
def test_what_an_export_brings_itself_is_not_given_along(
    bases: Bases, tmp_path: Path, cli: Cli, words: tuple[str, str]
) -> None:
    out = export(bases, tmp_path / "out", "nf4", "nf4", {})
    refused = cli("drift", out, out, *words, *QUICK)
    assert refused.exit_code == 2 and f"leave {words[0]} out" in refused.stderr, refused.stderr


def test_nor_is_what_a_base_leaves_unused(tiny_llama: tiny.TinyLlama, bases: Bases) -> None:
    with pytest.raises(PlanError, match="leave --base out"):
        opened_reference.open_trained(tiny_llama.nf4, base=Path("nowhere"))
    with pytest.raises(PlanError, match="--projection-rounding is for an adapter"):
        opened_reference.open_trained(tiny_llama.nf4, projection_rounding="float16")


def test_of_an_artefact_the_adapter_of_an_exported_reference_runs(
    bases: Bases, tmp_path: Path, cli: Cli
) -> None:
    base, adapter = bases("nf4")
    other = tiny.make_adapter(base, tmp_path / "other", vectors_seed=77)
    pairs: list[Any] = [(other, 1.0), (adapter, 1.0)]
    target.export(base, pairs, tmp_path / "both", mode="branch", weights="nf4")
    reference = export(bases, tmp_path / "out", "nf4", "nf4", {})
    found = json.loads(cli("drift", reference, tmp_path / "both", *QUICK, "--json").stdout)
    assert found["fidelity"]["kl"]["maximum"] == 0 and found["effect"]["kl"]["mean"]["value"] > 1e-4
