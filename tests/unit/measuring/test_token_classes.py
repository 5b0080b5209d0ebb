"""Drift of what gives rows of logits for a text, against scipy and PEFT's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats

from tests import heads, tiny_encoder
from tests.heads import DECODERS, ENCODERS
from vera_edge import merging as merge
from vera_edge.errors import DataError, MismatchError
from vera_edge.exporting import target
from vera_edge.measuring.assess import DriftRequest, assess_any
from vera_edge.measuring.token_classes import compare_rows, row_distances

Float32 = npt.NDArray[np.float32]
ALL = {**ENCODERS, **DECODERS}


def _rows(seed: int, classes: int | None = None) -> list[Float32]:
    draw = np.random.default_rng(seed)
    lengths = np.random.default_rng(0).integers(3, 9, 12)
    shapes = [(length, classes) if classes else (2, length) for length in lengths]
    return [draw.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("classes", [4, None])
def test_a_text_counts_by_the_mean_of_its_rows(classes: int | None) -> None:
    reference, found = _rows(1, classes), _rows(2, classes)
    kl = [
        scipy.stats.entropy(
            scipy.special.softmax(p.astype(float), 1), scipy.special.softmax(q.astype(float), 1), axis=1
        )
        for p, q in zip(reference, found, strict=True)
    ]
    same = [(p.argmax(1) == q.argmax(1)).mean() for p, q in zip(reference, found, strict=True)]
    measured = compare_rows(reference, found)
    assert measured.texts == 12
    assert measured.kl.value == pytest.approx(np.mean([one.mean() for one in kl]), rel=1e-9)
    assert measured.agreement.value == pytest.approx(np.mean(same), rel=1e-9)
    assert row_distances(reference, found) == pytest.approx([one.mean() for one in kl], rel=1e-9)
    assert measured.kl.low < measured.kl.value < measured.kl.high


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"shape \[\d, 3\], the reference \[\d, 4\]"):
        compare_rows(_rows(1, 4), _rows(1, 3))
    with pytest.raises(DataError, match="one class leaves nothing"):
        compare_rows(_rows(1, 1), _rows(2, 1))
    with pytest.raises(DataError, match="2 texts are too few"):
        compare_rows(_rows(1, 4)[:2], _rows(2, 4)[:2])


def _text(folder: Path) -> str:
    (folder / "text").write_text("\n\n".join(tiny_encoder.TEXTS * 2))
    return str(folder / "text")


@pytest.mark.parametrize("name", ["roberta classes", "roberta tags", "roberta spans", "llama tags"])
def test_every_head_is_measured(name: str, tmp_path: Path) -> None:
    base, adapter = ALL[name].make(tmp_path)
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    target.export(base, [(adapter, 1.0)], tmp_path / "out", mode="branch", weights="int8")
    for folder, exact in (("m", True), ("out", False)):
        found: Any = assess_any(DriftRequest(adapter, tmp_path / folder, base=base, data=_text(tmp_path)))
        assert found.classes.kl.value < (1e-9 if exact else found.effect.kl.value / 2)
        assert found.effect.kl.value > 1e-4 and found.text.windows == len(tiny_encoder.TEXTS * 2)
    assert any("as trained" in note for note in found.notes)


def test_the_effect_is_that_of_the_vectors_under_the_head_that_was_trained(tmp_path: Path) -> None:
    """Without the adapter the base has no head at all, so the trained one stays."""
    import torch

    trained = ENCODERS["roberta tags"]
    base, adapter = trained.make(tmp_path)
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    found: Any = assess_any(DriftRequest(adapter, tmp_path / "m", base=base, data=_text(tmp_path)))
    from transformers import AutoTokenizer

    tokenizer, on = AutoTokenizer.from_pretrained(base), trained.train(base)
    off = trained.train(base)
    for name, value in off.named_parameters():
        if "vera_lambda_b" in name:
            value.data.zero_()
    kl = []
    for text in tiny_encoder.TEXTS * 2:
        inputs = tokenizer(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            p, q = (torch.log_softmax(model(**inputs).logits[0].double(), 1) for model in (on, off))
        kl.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert found.effect.kl.value == pytest.approx(np.mean(kl), rel=1e-4)


def test_a_model_of_images_is_refused_in_one_sentence(tmp_path: Path) -> None:
    from tests.families import FAMILIES

    family = FAMILIES["vit"]
    family.make().save_pretrained(tmp_path / "base")
    family.adapted(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(DataError, match="ViTForImageClassification, which takes pixel_values") as caught:
        assess_any(DriftRequest(tmp_path / "adapter", tmp_path / "base", base=tmp_path / "base"))
    assert "\n" not in str(caught.value)


def test_positions_that_begin_behind_the_padding_bound_the_texts(tmp_path: Path) -> None:
    """A RoBERTa of 64 positions reads 62 tokens."""
    base, adapter = ENCODERS["roberta classes"].make(tmp_path)
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    (tmp_path / "text").write_text("\n\n".join(["row " * 90] * 3))
    found: Any = assess_any(DriftRequest(adapter, tmp_path / "m", base=base, data=str(tmp_path / "text")))
    assert found.text.window == 62 and found.classes.kl.value < 1e-9
    assert heads.feeds()["input_ids"].shape[1] < 62
