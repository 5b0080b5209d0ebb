"""A tiny BERT with a real WordPiece tokenizer: one that gives embeddings, and one that gives classes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.families import FAMILIES, Family

TEXTS = (
    "The adapter scales each row.",
    "Merge the two in float32, then quantize again: a small delta may fall between the grid points.",
    "Base layer",
    "A weight of the base layer keeps its bytes, and the side-branch adds what the adapter learned.",
    "row",
)
_TARGETS = ("query", "key", "value", "dense")
_SIZES = {**FAMILIES["bert"].config, "vocab_size": 160}
EMBEDDINGS = Family("BertModel", _TARGETS, _SIZES)
LABELS = ("bad", "middling", "good")


def classifier(**config: Any) -> Family:
    """A classifier of three labels."""
    labels = dict(enumerate(LABELS))
    names = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
    return Family("BertForSequenceClassification", _TARGETS, {**_SIZES, **names, **config})


def make(family: Family, root: Path) -> tuple[Path, Path]:
    """Base and adapter in `root`, the base with its tokenizer."""
    family.make().save_pretrained(root / "base")
    save_tokenizer(root / "base")
    return root / "base", family.adapted(root / "base", root / "adapter")


def save_tokenizer(folder: Path) -> None:
    """WordPiece of the words of TEXTS, with [CLS] and [SEP] around a text and types for the two of a pair."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(TEXTS).lower()))
    letters = set("".join(words))
    # Not trained: WordPieceTrainer breaks ties in another way in each process.
    pieces = [*special, *sorted(words | letters), *(f"##{letter}" for letter in sorted(letters))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    assert len(vocabulary) <= 160
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "model_max_length": 24,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def pooled(folder: Path, config: Mapping[str, Any], normalize: bool, longest: int | None = None) -> None:
    """The files in which sentence-transformers says how it makes embeddings."""
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
    ]
    if normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{package}.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if longest is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
