"""How the public interface takes paths, adapters, sizes, plans and trust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vera_edge
from tests import tiny
from tests.conftest import Cli
from vera_edge.api.arguments import Adapters, folders, size_or_none, weighted


@pytest.mark.parametrize(
    ("adapter", "pairs"),
    [
        ("a", [("a", 0.5)]),
        (Path("a"), [("a", 0.5)]),
        (["a", Path("b")], [("a", 0.5), ("b", 0.5)]),
        ([("a", 2), "b"], [("a", 2.0), ("b", 0.5)]),
        ({"a": 1, "b=c": 0.3}, [("a", 1.0), ("b=c", 0.3)]),
        ((), []),
    ],
)
def test_adapters_are_one_several_or_weighted(adapter: Adapters, pairs: list[tuple[str, float]]) -> None:
    assert weighted(adapter, 0.5) == [(Path(path), weight) for path, weight in pairs]


def test_one_folder_is_a_list_of_one() -> None:
    assert folders("a") == folders(["a"]) == folders((Path("a"),)) == [Path("a")]


def test_a_size_is_bytes_or_words() -> None:
    assert size_or_none("2MB") == size_or_none(2_000_000) == 2_000_000
    assert size_or_none(None) is None
    with pytest.raises(vera_edge.PlanError, match="isn't a size"):
        size_or_none("much")


def test_a_base_that_was_loaded_somehow_must_be_named(tmp_path: Path) -> None:
    for function in (vera_edge.inspect, vera_edge.projections):
        with pytest.raises(vera_edge.PlanError, match="give the base with it"):
            function(tmp_path, trained_as="nf4")
    with pytest.raises(vera_edge.PlanError, match="isn't a way to load a base"):
        vera_edge.inspect(tmp_path, base=tmp_path, trained_as="nonsense")


def test_what_a_plan_decides_is_refused_beside_it(tmp_path: Path) -> None:
    with pytest.raises(vera_edge.PlanError, match="the plan decides to, which was given as 'nf4'"):
        vera_edge.merge(tmp_path, tmp_path, out=tmp_path / "out", plan="plan.json", to="nf4")
    with pytest.raises(vera_edge.PlanError, match="the plan decides mode"):
        vera_edge.export(tmp_path, tmp_path, out=tmp_path / "out", plan="plan.json", mode="branch")


def test_trust_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    for function in (vera_edge.verify, vera_edge.validate, vera_edge.bench, vera_edge.rollback):
        with pytest.raises(vera_edge.PlanError, match="contradict each other"):
            function(tmp_path, require_signature=True, allow_unsigned=True)


def test_a_signature_needs_one_way_to_sign(tmp_path: Path) -> None:
    for words in ({}, {"key": tmp_path, "keyless": True}):
        with pytest.raises(vera_edge.PlanError, match="one of them"):
            vera_edge.sign(tmp_path, **words)  # type: ignore[arg-type]


def test_verify_and_out_of_projections_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(vera_edge.PlanError, match="don't go together"):
        vera_edge.projections(tmp_path, verify=True, out=tmp_path / "file")


def test_the_command_prints_what_the_function_gives(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli
) -> None:
    found = vera_edge.inspect(tiny_adapter, base=tiny_llama.nf4)
    printed = cli("inspect", tiny_adapter, "--base", tiny_llama.nf4, "--json")
    assert json.loads(printed.stdout) == json.loads(json.dumps(found.to_dict()))
    planned = vera_edge.plan_merge(tiny_llama.nf4, {tiny_adapter: 0.5}, to="bf16")
    words = (tiny_llama.nf4, tiny_adapter, "--weight", 0.5, "--to", "bf16", "--out", "nowhere", "--dry-run")
    assert json.loads(cli("merge", *words, "--json").stdout) == planned.to_dict()


def test_nothing_is_printed(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = set[str]()
    vera_edge.merge(
        tiny_llama.nf4,
        tiny_adapter,
        out=str(tmp_path / "merged"),
        to="fp16",
        progress=lambda what, done, total: seen.add(what),
    )
    assert seen == {"merging"}
    assert capfd.readouterr() == ("", "")
