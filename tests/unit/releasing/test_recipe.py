"""Recipes: what is wrong in one is said in a sentence, before any work; what is right is read as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vera_edge.combining.combination import Combination
from vera_edge.errors import PlanError
from vera_edge.releasing import recipe as recipes
from vera_edge.releasing.adapter_entry import AdapterEntry
from vera_edge.releasing.variant import Variant

BASE: dict[str, Any] = {"id": "tiny", "path": "nf4"}
RECIPE: dict[str, Any] = {
    "release": {"name": "tiny"},
    "base": [BASE],
    "adapter": [{"id": "a", "base": "tiny", "path": "a"}],
    "variant": [{"target": "onnx", "mode": "branch", "weights": "int8"}],
    "limits": {"data": "t.txt", "max_kl": 0.05},
}
# Every key of a recipe, by its table; the fuzzer gives each of them what doesn't belong there.
KEYS = [
    *[("release", key) for key in recipes.ReleaseTable.model_fields],
    *[("base", key) for key in recipes.Base.model_fields],
    *[("adapter", key) for key in AdapterEntry.model_fields],
    *[("variant", key) for key in Variant.model_fields],
    *[("limits", key) for key in recipes.LimitsEntry.model_fields],
    *[("sign", key) for key in recipes.Signing.model_fields],
]


PAIR = [{"path": "a", "weight": 0.7}, {"path": "b", "weight": -1}]


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(f"\\U{ord(mark):08x}" for mark in value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(as_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    return repr(value)


def write(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "r.toml"
    path.write_text("\n".join(f"{key} = {as_toml(value)}" for key, value in document.items()))
    return path


def changed(table: str, **values: Any) -> dict[str, Any]:
    """RECIPE with keys of a table, or of the first of its kind, replaced."""
    old = RECIPE.get(table, {})
    new = [{**old[0], **values}, *old[1:]] if isinstance(old, list) else {**old, **values}
    return {**RECIPE, table: new}


def fault(folder: Path, document: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as found:
        recipes.read(write(folder, document))
    return str(found.value)


def test_a_recipe_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = recipes.read(write(tmp_path, RECIPE))
    assert found.folder == tmp_path and found.path("nf4") == tmp_path / "nf4"
    assert [(adapter.id, variant.name) for adapter, variant in found.jobs] == [("a", "onnx-branch-int8")]
    assert found.file.limits.max_kl == 0.05


def test_an_adapter_can_be_a_combination(tmp_path: Path) -> None:
    ties = {"id": "mix", "base": "tiny", "combine": PAIR, "combination": "ties", "density": 0.5}
    (entry,) = recipes.read(write(tmp_path, {**RECIPE, "adapter": [ties]})).file.adapter
    assert entry.paths == ("a", "b") and [part.weight for part in entry.combine or ()] == [0.7, -1.0]
    assert entry.asked == Combination("ties", 0.5)
    del ties["density"]
    assert "adapter[0] ties needs a density" in fault(tmp_path, {**RECIPE, "adapter": [ties]})
    assert "adapter[0].combine" in fault(tmp_path, {**RECIPE, "adapter": [{**ties, "combine": PAIR[:1]}]})


@pytest.mark.parametrize(
    ("table", "values", "sentence"),
    [
        ("release", {"name": "../tiny"}, "release.name must be 1 to 64 letters"),
        ("release", {"version": "1\n---\nlicense: mit"}, "release.version must be one line of text"),
        ("release", {"golden": "yes"}, "release.golden"),
        ("release", {"naem": "tiny"}, "release.naem isn't a key of a recipe; check its spelling"),
        ("base", {"path": "nf4\0"}, "base[0].path must be one line of text"),
        ("adapter", {"id": "Rejected"}, "adapter[0].id can't be 'Rejected', which is the name of something"),
        ("adapter", {"id": "release.json"}, "which is the name of something else"),
        ("adapter", {"id": "nul.txt"}, "which is the name of something else"),
        ("adapter", {"combine": PAIR}, "adapter[0] needs a path, or combine with several"),
        ("adapter", {"density": 0.5}, "adapter[0] has density, which belongs to combine"),
        ("adapter", {"base": "other"}, "adapter 'a' names base 'other', which isn't there"),
        ("variant", {"weights": "int3"}, "variant[0] has weights 'int3'; choose from same, fp32, fp16"),
        ("variant", {"block": 48}, "variant[0].block input should be 16, 32, 64, 128 or 256"),
        ("variant", {"mode": "merged", "vectors": "fp16"}, 'has vectors, which belongs to mode = "branch"'),
        ("variant", {"mode": "merged", "projections": "seed"}, "has projections, which belongs to mode"),
        ("variant", {"weights": "plan", "plan": "p", "block": 64}, "has block, and a plan decides on that"),
        ("variant", {"target": "onxn"}, "is for 'onxn', which isn't a target here; choose from gguf, onnx"),
        ("variant", {"adapters": []}, "variant[0].adapters"),
        ("variant", {"adapters": ["b"]}, "names adapter 'b', which isn't there"),
        ("variant", {"max_kl": 0.1}, 'variant[0] has max_kl, which belongs to weights = "plan"'),
        ("variant", {"weights": "plan"}, "needs one of plan, max_kl and max_size"),
        ("variant", {"weights": "plan", "max_size": "ninety"}, "'ninety' isn't a size"),
        ("limits", {"max_kl": float("inf")}, "limits.max_kl input should be a finite number"),
        ("limits", {"min_retained": float("-inf")}, "limits.min_retained input should be a finite number"),
        ("limits", {"tokens": 2.5}, "limits.tokens"),
        ("limits", {"window": 512, "tokens": 64}, "limits has a window of 512 tokens and measures 64"),
        ("sign", {"public_key": "p.pem"}, "sign needs a key, or identity and issuer"),
        ("sign", {"identity": "who", "issuer": "https://i", "public_key": "p"}, "sign has public_key, which"),
    ],
)
def test_what_is_wrong_is_said_with_the_key_it_stands_in(
    tmp_path: Path, table: str, values: dict[str, Any], sentence: str
) -> None:
    assert sentence in fault(tmp_path, changed(table, **values))


@pytest.mark.parametrize("table", ["base", "adapter"])
@pytest.mark.parametrize("other", ["same", "case"])
def test_ids_differ_and_not_by_case_only(tmp_path: Path, table: str, other: str) -> None:
    entry = RECIPE[table][0]
    twin = {**entry, "id": entry["id"].upper() if other == "case" else entry["id"]}
    assert "stands twice" in fault(tmp_path, {**RECIPE, table: [entry, twin]})


def test_variants_of_one_folder_stand_twice(tmp_path: Path) -> None:
    variants = [*RECIPE["variant"], {**RECIPE["variant"][0], "head": "int8"}]
    assert "variant 'onnx-branch-int8' stands twice" in fault(tmp_path, {**RECIPE, "variant": variants})


@pytest.mark.parametrize(
    "text",
    ["[release", "a = " + "[" * 9999, "a = " + "9" * 9999, "a = \xff"],
    ids=["cut", "deep", "long", "x"],
)
def test_what_is_no_toml_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(PlanError, match="isn't valid TOML"):
        recipes.read(path)
    with pytest.raises(PlanError, match="can't be read"):
        recipes.read(tmp_path)


def test_a_home_that_is_nobodys_is_told(tmp_path: Path) -> None:
    found = recipes.read(write(tmp_path, changed("base", path="~nobody-at-all/nf4")))
    with pytest.raises(PlanError, match="starts from a home folder that isn't there"):
        found.path(found.file.base[0].path)


def values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(
            ["", ".", "..", "/etc/passwd", "~", "plan", "seed", "gptq", "branch", "tiny", "a", "1MB"]
        ),
    )
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner)
    )


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), values())
def test_whatever_stands_in_a_recipe_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: tuple[str, str], value: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = write(folder, changed(key[0], **{key[1]: value}))
    try:
        found = recipes.read(path)
    except PlanError as refused:
        assert str(refused).startswith(f"{path}: ") and "\n" not in str(refused)
        return
    assert found.jobs, "nothing to make"
    for adapter, variant in found.jobs:
        place = (folder / "out" / adapter.id / variant.name).resolve()
        assert place.parent.parent == (folder / "out").resolve(), "a bundle outside of the release"


def test_a_strangers_recipe_reaches_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    """Whichever of its paths it is, and not one's own links."""
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "linked").symlink_to(tmp_path)
    file = recipes.RecipeFile.model_validate(RECIPE)
    confined = recipes.Recipe(file, tmp_path / "inputs", confined=True)
    for path in (
        "../x",
        "a/../../x",
        "/etc/hostname",
        "~/x",
        "~root/x",
        "..",
        "..\\x",
        "C:\\x",
        "\\\\host\\x",
    ):
        with pytest.raises(PlanError, match="leads out of"):
            confined.path(path)
    assert confined.path("linked/x") == tmp_path / "inputs" / "linked" / "x"
    assert recipes.Recipe(file, tmp_path / "inputs").path("../x") == tmp_path / "inputs" / ".." / "x"
