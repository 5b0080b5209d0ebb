"""Merging on many model families equals PEFT's own unmerged forward; so does every naming of their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.make_families_table import TABLE, table
from tests.families import FAMILIES, Family
from vera_edge import merging as merge
from vera_edge.adapters.reading import read
from vera_edge.adapters.vera import vectors_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.reference.model import open_reference
from vera_edge.trained import alignment, provenance

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def _forward(model: Any, family: Family) -> Any:
    import torch

    with torch.no_grad():
        return model(**family.inputs())[0]


def _unmerged(family: Family, base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return _forward(PeftModel.from_pretrained(family.load(base), adapter).eval(), family)


def _far(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest output."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_is_what_peft_computes_unmerged(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, out = tmp_path / "base", tmp_path / "merged"
    family.make().save_pretrained(base)
    folder = family.adapted(base, tmp_path / "adapter")
    checkpoint = Checkpoint.open(base)
    adapter = alignment.read(folder, checkpoint)
    assert set(adapter.vectors) <= set(checkpoint.linears)
    assert {module.rsplit(".", 1)[-1] for module in read(folder).vectors} == set(family.targets)
    for module, vectors in vectors_of(adapter).items():
        assert vectors.lambda_b.size == checkpoint.linears[module].out_features
    assert provenance.resolve(adapter, checkpoint).spec.rounding == "float32"
    expected = _unmerged(family, base, folder)
    assert _far(_forward(family.load(base), family), expected) > 0.1, "the adapter must show"
    merge.to_folder(base, [(folder, 1.0)], out, "fp32")
    assert _far(_forward(family.load(out), family), expected) < 1e-4


def _rewrite(source: Path, target: Path, rename: Any) -> None:
    """A checkpoint with its tensors renamed; None drops one."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    kept = {rename(name): value for name, value in tensors.items() if rename(name) is not None}
    save_file(kept, target / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bert", "bert."), ("opt", "model."), ("llama", "model.")]
)
def test_a_checkpoint_may_lack_the_models_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    """As GPT-2 on the Hub, whose layers are h.0 and the model's transformer.h.0."""
    family = FAMILIES[name]
    family.make().save_pretrained(tmp_path / "saved")
    base, out = tmp_path / "base", tmp_path / "merged"
    _rewrite(tmp_path / "saved", base, lambda tensor: tensor.removeprefix(prefix))
    folder = family.adapted(base, tmp_path / "adapter")
    adapter = alignment.read(folder, Checkpoint.open(base))
    assert adapter.as_trained is not None
    inside = [module for module in adapter.as_trained.vectors if module.startswith(prefix)]
    assert inside and all(module.removeprefix(prefix) in adapter.vectors for module in inside)
    merge.to_folder(base, [(folder, 1.0)], out, "fp32")
    assert _far(_forward(family.load(out), family), _unmerged(family, base, folder)) < 1e-4


def test_the_reference_takes_an_aligned_adapter(tmp_path: Path) -> None:
    family = FAMILIES["gpt2"]
    family.make().save_pretrained(tmp_path / "saved")
    base = tmp_path / "base"
    _rewrite(tmp_path / "saved", base, lambda tensor: tensor.removeprefix("transformer."))
    folder = family.adapted(base, tmp_path / "adapter")
    checkpoint = Checkpoint.open(base)
    adapter = alignment.read(folder, checkpoint)
    projections = provenance.resolve(adapter, checkpoint).projections
    reference = open_reference(checkpoint, [(adapter, 1.0)], projections)
    assert _far(_forward(reference.model, family), _unmerged(family, base, folder)) < 1e-4


KNOWN = [
    "vision_tower.layers.0.self_attn.q_proj",
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.model.layers.1.self_attn.q_proj",
    "language_model.lm_head",
]


@pytest.mark.parametrize(
    ("modules", "known", "expected"),
    [
        # two parts in another order, as multimodal checkpoints before transformers 4.52 have them
        (["model.language_model.layers.1.self_attn.q_proj"], KNOWN, KNOWN[2:3]),
        (["model.layers.1.self_attn.q_proj"], KNOWN, KNOWN[2:3]),
        (["lm_head"], KNOWN, KNOWN[3:]),
        # which of two stacks isn't told
        (["layers.0.q"], ["encoder.layers.0.q", "decoder.layers.0.q"], None),
        (["layers.0.q", "layers.1.q"], ["encoder.layers.0.q", "decoder.layers.0.q", "decoder.layers.1.q"],
         ["decoder.layers.0.q", "decoder.layers.1.q"]),
        # a name of its own wins over one with a prefix
        (["encoder.0.q"], ["encoder.0.q", "x.encoder.0.q"], ["encoder.0.q"]),
        # nothing is guessed from the last part alone
        (["decoder.layers.0.q"], ["encoder.layers.0.q"], None),
        (["model.layers.0.q"], ["model.layers.1.q"], None),
        (["a.q", "q"], ["q"], None),
    ],
)  # fmt: skip
def test_names_match_in_one_way_or_not_at_all(
    modules: list[str], known: list[str], expected: list[str] | None
) -> None:
    found = alignment.match(modules, known)
    assert found == (None if expected is None else dict(zip(modules, expected, strict=True)))


def test_the_table_in_the_docs_is_made_of_these_families() -> None:
    assert TABLE.read_text() == table(), "run scripts/make_families_table.py"
