"""Manifests that nobody vouches for, every part of them: a sentence, in a moment, without memory."""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bundle.test_contents import HASH, PROJECTION, STEP, make, rewrite
from vera_edge.bundle import contents as bundle
from vera_edge.errors import BundleError, VeraEdgeError
from vera_edge.exporting import adapter_fit
from vera_edge.releasing.difference import compare_bundles

DRAWN = {
    "size": 96,
    "sha256": HASH,
    "dtype": "float32",
    "tensors": {"a": {"matrix": "A.T", "start": 0, "stop": 4, "offset": 0}},
}
EXPANDED = {
    "size": 4096,
    "sha256": HASH,
    "source": "config.json",
    "block": 32,
    "weights": {"w": {"rows": [["m", 0, 16]], "codes": 0, "scales": 512}},
}
CHECKED = {"tokens": 8, "bounds": {"a": 4}, "tolerance": 0.1}


def whole(folder: Path) -> Path:
    """A bundle whose manifest has something in every field."""
    make(folder)
    (folder / "adapters" / "demo.onnx_adapter").write_bytes(bytes(200))
    plan = {
        "version": 1,
        "mode": "branch",
        "weights": "same",
        "others": "same",
        "base": HASH,
        "options": {},
        "adapters": [{"digest": HASH, "weight": 1.0}],
        "projection": PROJECTION,
        "steps": [STEP],
    }
    facts = bundle.change(
        bundle.read(folder),
        base={"digest": HASH, "architecture": "LlamaForCausalLM", "trained": {"head.weight": HASH}},
        plan=plan,
        vectors=[("m", 0, 8), ("m", 8, 16)],
        branches={"vectors": ["m"]},
        model_version=3,
        trained_names={"m": "base.m"},
        generated={"drawn": DRAWN, "expanded": EXPANDED},
        options={"head": "fp32"},
        exact=True,
        golden="config.json",
        cpu=["vnni"],
        checked={**CHECKED, "shrunk": CHECKED},
    )
    bundle.write(folder, facts)
    return folder


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one place in a manifest."""

    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


def _drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


TENSOR = ("generated", "drawn", "tensors", "a")
WEIGHT = ("generated", "expanded", "weights", "w")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("generated", "expanded", "source", to=["config.json"]), "source is .* where a string belongs"),
        (_set("generated", "expanded", "source", to="other"), "names no listed source"),
        (_set("generated", "expanded", "dtype", to="float32"), ""),
        (_set("generated", "drawn", "size", to=3), "reaches past the end"),
        (_set(*TENSOR, "stop", to=9), "rows 0 to 9 of the 8 of"),
        (_set(*TENSOR, "start", to=4), "rows 4 to 4"),
        (_set(*WEIGHT, "rows", to=[["m", 0, 2**50]]), "lie over each other"),
        (_set(*WEIGHT, "rows", to=[["m", 0, 4000]] * 9), "lie over each other"),
        (_set(*WEIGHT, "rows", 0, to=[0, "m", 1]), r"rows\[0\]\[0\] is 0 where a string belongs"),
        (_set(*WEIGHT, "codes", to=2**50), "reaches past the end"),
        (_drop("projection", "rank"), "projection has no rank"),
        (_set("projection", "rank", to=2**30), r"rank is 1073741824; it must be at most 16777216"),
        (_set("projection", "in_max", to=2**24), "hold .* values"),
        (_set("projection", "rounding", to=[]), "rounding"),
        (_drop("plan", "steps", 0, "module"), r"plan.steps\[0\] has no module"),
        (_drop("plan", "steps"), "plan has no steps"),
        (_set("plan", "steps", 0, to=None), r"plan.steps\[0\] is None where an object belongs"),
        (_set("plan", "steps", 0, "shape", to=[16]), "at least 2 items"),
        (_set("plan", "steps", 0, "options", to=[]), "an object"),
        (_set("plan", "adapters", to={}), "an array"),
        (_set("vectors", to=[["m", 0, 2**52]]), "rows 0 to 4503599627370496 of m, which has 16"),
        (_set("vectors", to=[["m", 0, 16]] * 1000), "which has 16"),
        (_set("vectors", to=[["other", 0, 1]]), "no side-branch in the plan"),
        (_set("files", "adapters/demo.onnx_adapter", "size", to=70), "adapter demo holds less"),
        (_set("base", "trained", to=[]), "trained"),
        (_set("base", "architecture", to=4), "architecture"),
        (_set("adapters", "demo", "weight", to="1"), "weight is '1' where a number belongs"),
        (_set("checked", "shrunk", "tokens", to=-1), "tokens is -1"),
        (_set("checked", to={}), "checked has no tokens"),
        (_set("cpu", to=[["vnni"]]), "cpu"),
        (_set("options", "head", to=None), "options"),
        (_set("branches", "vectors", to=["n"]), "branches names"),
        (_set("branches", "outputs", to=[]), "branches names no module"),
        (_set("branches", to={"outputs": ["m"]}), "branches with vectors"),
        (_set("branches", to={"vectors": ["m"], "pairs": ["m"]}), "branches with pairs"),
        (_set("branches", "gates", to=["m"]), "branches"),
    ],
)
def test_every_part_is_held_against_its_shape(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    rewrite(whole(tmp_path), change)
    if not said:
        with pytest.raises(BundleError):
            rewrite(tmp_path, _drop("generated", "expanded", "block"))
            bundle.read(tmp_path)
        return
    with pytest.raises(BundleError, match=said) as caught:
        bundle.read(tmp_path)
    assert "\n" not in str(caught.value) and "vera_edge.json" in str(caught.value)


def test_vectors_without_a_plan_fit_the_projections(tmp_path: Path) -> None:
    rewrite(whole(tmp_path), lambda value: value.update(plan=None, branches={}))
    assert adapter_fit.module_shapes(bundle.read(tmp_path)) == {}
    rewrite(tmp_path, lambda value: value.update(vectors=[["m", 0, 17]]))
    with pytest.raises(BundleError, match="rows 0 to 17 of m, which has 16"):
        bundle.read(tmp_path)


def test_a_manifest_of_many_small_values(tmp_path: Path) -> None:
    whole(tmp_path)
    rewrite(tmp_path, lambda value: value.update(more=[[]] * 700_000))
    tracemalloc.start()
    with pytest.raises(BundleError, match="over 600000 JSON values"):
        bundle.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [each for key, one in inner for each in _places(one, (*place, key))]


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**52, 10**200, 0.5, "", "x", "a" * 2000, [], [[]], {}, {"": None}),
    *({"digest": 1}, ["m", 0, 1], [["m", 0, 2**52]], "\U0001f600", "../x"),
)


def test_any_place_changed_gives_a_manifest_or_a_sentence(tmp_path: Path) -> None:
    """And what reads it afterwards does too."""
    old = whole(tmp_path / "old")
    new = whole(tmp_path / "new")
    sound, draw = bundle.read(new).to_dict() | {"digest": ""}, random.Random(3)
    places, refused = _places(sound), 0
    for _ in range(400):
        value: Any = copy.deepcopy(sound)
        place, junk = draw.choice(places), draw.choice(JUNK)
        (_drop(*place) if draw.random() < 0.2 else _set(*place, to=junk))(value)
        rewrite(
            new, lambda manifest, value=value: (manifest.clear(), manifest.update({"digest": ""} | value))
        )
        try:
            manifest = bundle.read(new)
            compare_bundles(old, new)
            adapter_fit.module_shapes(manifest)
            assert manifest.needs_vnni in (True, False) and manifest.size >= 0 and manifest.drawn is not None
        except VeraEdgeError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 180
