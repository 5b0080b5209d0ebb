"""Embeddings and classes on the device, against transformers' tokenizer and PEFT's own forward."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny_bundle, tiny_encoder
from tests.conftest import Cli
from tests.families import Family
from tests.tiny_encoder import LABELS, TEXTS
from vera_edge.bundle import contents as bundle
from vera_edge.device.check import golden_encoder
from vera_edge.device.check.validate import validate
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, DataError, MismatchError
from vera_edge.exporting import golden_vectors, target

LONG = " ".join(TEXTS)  # over the 24 tokens of the tokenizer


class Made:
    """A model, and its branch export in float32."""

    def __init__(self, family: Family, root: Path) -> None:
        self.family = family
        self.base, self.adapter = tiny_encoder.make(family, root)
        self.out = root / "out"
        target.export(self.base, [(self.adapter, 1.0)], self.out, mode="branch", weights="fp32")

    def truth(self, texts: Sequence[Any], active: bool = True) -> tuple[Any, Any]:
        """PEFT's first output and the mask, by transformers' own tokenizer, padded."""
        import torch
        from peft import PeftModel
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        split = [text if isinstance(text, tuple) else (text, None) for text in texts]
        pairs = [pair for _, pair in split]
        first = [text for text, _ in split]
        second = None if pairs[0] is None else pairs
        inputs = tokenizer(first, second, padding=True, truncation=True, return_tensors="pt")
        model = PeftModel.from_pretrained(self.family.load(self.base), self.adapter).eval()
        with torch.no_grad():
            if active:
                found = model(**inputs)
            else:
                with model.disable_adapter():
                    found = model(**inputs)
        return found[0], inputs["attention_mask"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tiny_encoder.EMBEDDINGS, tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tiny_encoder.classifier(), tmp_path_factory.mktemp("classifier"))


def mean(hidden: Any, mask: Any) -> Any:
    """The formula of sentence-transformers' model cards."""
    wide = mask.unsqueeze(-1).expand(hidden.size()).float()
    return (hidden * wide).sum(1) / wide.sum(1).clamp(min=1e-9)


def test_embeddings_are_the_mean_of_pefts_hidden_states(embedder: Made) -> None:
    encoder = Encoder.open(embedder.out)
    texts = [*TEXTS, LONG]
    expected = mean(*embedder.truth(texts)).numpy()
    found = encoder.embed(texts)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
    assert encoder.longest == 24  # so the long text was cut as transformers cuts it
    np.testing.assert_allclose(encoder.embed(texts, batch=1), expected, atol=1e-5 * scale)
    np.testing.assert_allclose(np.linalg.norm(encoder.embed(texts, normalize=True), axis=1), 1, atol=1e-6)
    encoder.swap(None)
    base = mean(*embedder.truth(texts, active=False)).numpy()
    np.testing.assert_allclose(encoder.embed(texts), base, atol=1e-5 * scale)
    assert np.abs(base - expected).max() > 0.1 * scale  # two models, so a lost adapter would have failed


def test_many_texts_come_back_in_their_order(embedder: Made) -> None:
    encoder = Encoder.open(embedder.out)
    texts = [TEXTS[number % len(TEXTS)] for number in range(70)]
    found = encoder.embed(texts, batch=8)
    once = encoder.embed(TEXTS)
    scale = np.abs(once).max()
    for row, text in zip(found, texts, strict=True):
        np.testing.assert_allclose(row, once[TEXTS.index(text)], atol=1e-5 * scale)


def last(hidden: Any, mask: Any) -> Any:
    return hidden[range(len(hidden)), mask.sum(1) - 1]


def weighted(hidden: Any, mask: Any) -> Any:
    weights = (mask * mask.cumsum(1)).unsqueeze(-1).float()
    return (hidden * weights).sum(1) / weights.sum(1)


def beside(hidden: Any, mask: Any) -> Any:
    import torch

    return torch.cat([hidden[:, 0], mean(hidden, mask)], 1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("config", "formula"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda h, m: h[:, 0]),
        ({"pooling_mode_mean_tokens": True}, mean),
        ({"pooling_mode": "mean"}, mean),
        (
            {"pooling_mode_mean_sqrt_len_tokens": True},
            lambda h, m: mean(h, m) * m.sum(1, keepdim=True).float().sqrt(),
        ),
        (
            {"pooling_mode_max_tokens": True},
            lambda h, m: h.masked_fill(m[..., None] == 0, -1e9).max(1).values,
        ),
        ({"pooling_mode": "lasttoken"}, last),
        ({"pooling_mode_weightedmean_tokens": True}, weighted),
        ({"pooling_mode": ["cls", "mean"]}, beside),
    ],
)
def test_pooling_is_what_the_folder_says(
    embedder: Made, tmp_path: Path, config: dict[str, Any], formula: Any, normalize: bool
) -> None:
    import torch

    folder = shutil.copytree(embedder.out, tmp_path / "b")
    tiny_encoder.pooled(folder, config, normalize)
    tiny_bundle.rewrite(folder)
    expected = formula(*embedder.truth(TEXTS))
    expected = torch.nn.functional.normalize(expected) if normalize else expected
    found = Encoder.open(folder).embed(TEXTS)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * float(expected.abs().max()))


def test_an_export_brings_the_pooling_along(embedder: Made, tmp_path: Path) -> None:
    base = shutil.copytree(embedder.base, tmp_path / "base")
    tiny_encoder.pooled(base, {"pooling_mode_cls_token": True}, normalize=True, longest=9)
    target.export(base, [(embedder.adapter, 1.0)], tmp_path / "out", mode="merged", weights="fp32")
    encoder = Encoder.open(tmp_path / "out")
    assert encoder.longest == 9 and encoder.pooling.ways == ("cls",) and encoder.pooling.normalize
    assert len(encoder.encode([LONG])[0].ids) == 9


@pytest.mark.parametrize(
    ("modules", "config", "says"),
    [
        (b"{", {}, "isn't a list of modules"),
        (b'[{"type": 1}]', {}, "isn't a list of modules"),
        (b'[{"type": "a.Dense", "path": "2_Dense"}]', {}, "asks for the module 'Dense'"),
        (b'[{"type": "a.Pooling", "path": "../1"}]', {}, "unsafe path"),
        (None, {"pooling_mode": "median"}, "asks for pooling 'median'"),
        (None, {"pooling_mode": [["cls"]]}, "asks for pooling"),
    ],
)
def test_pooling_that_is_not_known_is_refused(
    embedder: Made, tmp_path: Path, modules: bytes | None, config: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(embedder.out, tmp_path / "b")
    tiny_encoder.pooled(folder, config, normalize=False)
    if modules is not None:
        (folder / "modules.json").write_bytes(modules)
    tiny_bundle.rewrite(folder)
    with pytest.raises(BundleError, match=says):
        Encoder.open(folder)


def test_probabilities_and_labels_are_those_of_transformers_pipeline(classifier: Made) -> None:
    import torch

    encoder = Encoder.open(classifier.out)
    assert encoder.labels == LABELS
    pairs = [("row", "The base layer"), (LONG, LONG), ("Merge the two", "row")]
    for texts in (list(TEXTS), pairs):
        logits, _ = classifier.truth(texts)
        found = encoder.probabilities(texts)
        np.testing.assert_allclose(found, torch.softmax(logits, 1).numpy(), atol=1e-5)
    base, _ = classifier.truth(TEXTS, active=False)
    encoder.swap(None)
    np.testing.assert_allclose(encoder.probabilities(TEXTS), torch.softmax(base, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_several_labels_and_regressions_have_functions_of_their_own(
    classifier: Made, tmp_path: Path, problem: str
) -> None:
    import torch

    folder = shutil.copytree(classifier.out, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    tiny_bundle.rewrite(folder)
    logits, _ = classifier.truth(TEXTS)
    expected = logits if problem == "regression" else torch.sigmoid(logits)
    np.testing.assert_allclose(Encoder.open(folder).probabilities(TEXTS), expected.numpy(), atol=1e-4)


def test_the_wrong_question_is_refused(embedder: Made, classifier: Made) -> None:
    encoder, classes = Encoder.open(embedder.out), Encoder.open(classifier.out)
    with pytest.raises(BundleError, match="gives embeddings, not classes"):
        encoder.probabilities(TEXTS)
    with pytest.raises(BundleError, match="gives classes, not embeddings"):
        classes.embed(TEXTS)
    with pytest.raises(DataError, match="put it into a list"):
        encoder.embed("one text")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        encoder.embed(["\ud800"])
    with pytest.raises(DataError, match="one text or more"):
        encoder.embed([])
    with pytest.raises(MismatchError, match="no adapter named"):
        encoder.swap("other")
    with pytest.raises(BundleError, match="holds an encoder, which generates no text"):
        Session.open(embedder.out)


def test_threads_share_an_encoder(embedder: Made) -> None:
    encoder = Encoder.open(embedder.out)
    alone = [encoder.embed([text]) for text in TEXTS]
    together: list[Any] = [None] * len(TEXTS)

    def work(index: int) -> None:
        for _ in range(5):
            together[index] = encoder.embed([TEXTS[index]])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.fixture(scope="module")
def golden(embedder: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(embedder.out, tmp_path_factory.mktemp("golden") / "b")
    golden_vectors.ask(folder, embedder.base, [(embedder.adapter, 1.0)], {"min_cosine": 0.9999})
    return folder


def test_a_sound_encoder_validates(golden: Path) -> None:
    assert 1000 < (golden / "golden.json").stat().st_size < 100_000
    result = validate(golden, max_memory=1 << 40)
    assert result.passed, result.checks
    names = {check.name for check in result.checks}
    assert names >= {"files", "tokens", "batches", "determinism", "swap", "leaks", "memory", "drift (base)"}
    assert [row.adapter for row in result.encoder_drift] == [None, "default"] and not result.drift
    for row in result.encoder_drift:
        assert row.cosine is not None and row.cosine > 0.99999 and row.kl is None
    assert any("max_flips" in note for note in validate(golden, limits={"max_flips": 0.1}).notes)


def test_classes_validate_by_their_divergence(classifier: Made, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    adapters = [(classifier.adapter, 1.0)]
    target.export(classifier.base, adapters, folder, mode="merged", weights="int8")
    golden_vectors.ask(folder, classifier.base, adapters, {"max_kl": 0.05, "min_top1": 0.8}, TEXTS)
    result = validate(folder)
    assert result.passed, result.checks
    (row,) = result.encoder_drift
    assert row.texts == len(TEXTS) and row.kl is not None and 0 < row.kl < 0.05
    strict = validate(folder, limits={"max_kl": 1e-9})
    assert [check.name for check in strict.checks if not check.passed] == ["drift (model)"]


def test_another_adapter_and_another_tokenizer_are_caught(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden, tmp_path / "b")
    vectors = dict(Encoder.open(golden).vectors)
    changed = {name: -value if name.endswith("lambda_b") else value for name, value in vectors.items()}
    version = bundle.read(folder).model_version
    assert version is not None
    tiny_bundle.write_adapter(folder / "adapters" / "default.onnx_adapter", changed, version)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny_bundle.rewrite(folder)
    found = validate(folder)
    assert {check.name for check in found.checks if not check.passed} == {"drift (default)", "tokens"}


@pytest.mark.parametrize(
    "change",
    [{"cases": []}, {"cases": [{}]}, {"cases": 3}, {"format": 2}, {"reference": None, "cases": [None]}],
)
def test_malformed_golden_vectors_are_refused(golden: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(json.loads((golden / "golden.json").read_text()) | change))
    with pytest.raises(BundleError, match=r"is malformed|has format"):
        golden_encoder.read(path)


def test_the_command_line_gives_vectors_and_classes(
    embedder: Made, classifier: Made, golden: Path, cli: Cli
) -> None:
    result = cli("run", embedder.out, TEXTS[0])
    found = json.loads(result.stdout)["embedding"]
    np.testing.assert_allclose(found, Encoder.open(embedder.out).embed([TEXTS[0]])[0], rtol=1e-5)
    result = cli("run", classifier.out, TEXTS[0], "--adapter", "none", "--json")
    classes = json.loads(result.stdout)["classes"]
    assert set(classes) == set(LABELS) and abs(sum(classes.values()) - 1) < 1e-5
    assert cli("run", classifier.out, TEXTS[0]).stdout.split()[1] in LABELS
    refused = cli("run", classifier.out, TEXTS[0], "--top-k", 3)
    assert refused.exit_code == 2 and "--top-k is for models that generate text" in refused.stderr
    shown = cli("validate", golden, "--min-cosine", 0.5)
    assert shown.exit_code == 0 and "cosine" in shown.stdout, shown.stderr
    impossible = cli("validate", golden, "--min-cosine", 1.1)
    assert impossible.exit_code == 2 and impossible.stderr.count("\n") == 1
