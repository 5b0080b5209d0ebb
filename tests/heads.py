"""Adapters trained under another class than their base was saved as: classifiers, tags, spans, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests import tiny, tiny_encoder
from tests.families import FAMILIES

Array = npt.NDArray[Any]
_BERT = {**FAMILIES["bert"].config, "vocab_size": 160}
_ROBERTA = {**_BERT, "pad_token_id": 1, "type_vocab_size": 1}
_LLAMA = {**FAMILIES["llama"].config, "vocab_size": 160}
_SMALL = ("query", "value")
_DISTILBERT = {
    "vocab_size": 160,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
_GPT2 = {**FAMILIES["gpt2"].config, "vocab_size": 160, "pad_token_id": 0}


@dataclass(frozen=True)
class Trained:
    """A model whose base was saved as `base` and which PEFT trained as what `auto` makes of it.

    task: PEFT's task type, None for auto_mapping. config: of the base. labels: of the head.
    """

    base: str
    auto: str
    task: str | None
    targets: Sequence[str]
    config: Mapping[str, Any]
    labels: int | None = None
    peft: Mapping[str, Any] = field(default_factory=dict)

    def make(self, root: Path) -> tuple[Path, Path]:
        """Base and adapter in `root`, the base with a tokenizer of words."""
        import torch
        import transformers

        cls = getattr(transformers, self.base)
        torch.manual_seed(sum(map(ord, self.base)))
        cls(cls.config_class(**self.config)).save_pretrained(root / "base")
        tiny_encoder.save_tokenizer(root / "base")
        self.train(root / "base").save_pretrained(root / "adapter")
        return root / "base", root / "adapter"

    def train(self, base: Path, **options: Any) -> Any:
        """The PEFT model on `base`, with values as if trained; `options` go to from_pretrained."""
        import torch
        import transformers
        from peft import VeraConfig, get_peft_model

        if self.labels is not None:
            options = {"num_labels": self.labels, **options}
        torch.manual_seed(11)
        model = getattr(transformers, self.auto).from_pretrained(base, dtype=torch.float32, **options)
        config = {"save_projection": False, "projection_prng_key": 7, **self.peft}
        settings = VeraConfig(r=8, task_type=self.task, target_modules=list(self.targets), **config)
        adapted = get_peft_model(model, settings)
        tiny.randomize(adapted, 0.5, 3)
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, value in sorted(adapted.named_parameters()):
                if "modules_to_save" in name:
                    value.copy_(0.3 * torch.randn(value.shape, generator=draw))
        return adapted.eval()

    def truth(
        self, base: Path, adapter: Path, feeds: Mapping[str, Array], active: bool = True
    ) -> list[Array]:
        """The outputs of PEFT's own forward, on the model that was trained."""
        import torch

        model = self.train(base)  # its head isn't in the base, so it is made again, by the same seeds
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
        with torch.no_grad():
            if active:
                found = model(**inputs)
            else:
                with model.disable_adapter():
                    found = model(**inputs)
        return outputs(found)

    def loaded(self, folder: Path, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of a merged folder in transformers, loaded by the task's class."""
        import torch
        import transformers

        model = getattr(transformers, self.auto).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return outputs(model(**{name: torch.from_numpy(value) for name, value in feeds.items()}))


def outputs(found: Any) -> list[Array]:
    """What a model gives: logits, hidden states, or an answer's two ends."""
    if hasattr(found, "start_logits"):
        return [found.start_logits.numpy(), found.end_logits.numpy()]
    return [found[0].numpy()]


def feeds(padding: int = 0, side: str = "right", rows: int = 3, length: int = 9) -> dict[str, Array]:
    """Token ids of several texts, all but the first shorter, and the mask."""
    ids = np.random.default_rng(rows).integers(3, 96, (rows, length))
    mask = np.ones_like(ids)
    for row in range(1, rows):
        count = 2 * row
        part = slice(length - count, None) if side == "right" else slice(0, count)
        ids[row, part], mask[row, part] = padding, 0
    return {"input_ids": ids, "attention_mask": mask}


ENCODERS: Mapping[str, Trained] = {
    "roberta classes": Trained(
        "RobertaForMaskedLM", "AutoModelForSequenceClassification", "SEQ_CLS", _SMALL, _ROBERTA, 3
    ),
    "roberta tags": Trained(
        "RobertaForMaskedLM", "AutoModelForTokenClassification", "TOKEN_CLS", _SMALL, _ROBERTA, 5
    ),
    "roberta spans": Trained(
        "RobertaForMaskedLM", "AutoModelForQuestionAnswering", "QUESTION_ANS", _SMALL, _ROBERTA
    ),
    "roberta embeddings": Trained("RobertaForMaskedLM", "AutoModel", "FEATURE_EXTRACTION", _SMALL, _ROBERTA),
    "distilbert classes": Trained(
        "DistilBertForMaskedLM",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        ("q_lin", "v_lin"),
        _DISTILBERT,
        4,
    ),
    "bert, no task type": Trained(
        "BertModel",
        "AutoModelForSequenceClassification",
        None,
        _SMALL,
        _BERT,
        3,
        {"modules_to_save": ["classifier"]},
    ),
}
DECODERS: Mapping[str, Trained] = {
    "llama reward": Trained(
        "LlamaForCausalLM", "AutoModelForSequenceClassification", "SEQ_CLS", ("q_proj", "v_proj"), _LLAMA, 1
    ),
    "llama tags": Trained(
        "LlamaForCausalLM", "AutoModelForTokenClassification", "TOKEN_CLS", ("q_proj", "v_proj"), _LLAMA, 3
    ),
    "qwen2 classes": Trained(
        "Qwen2ForCausalLM", "AutoModelForSequenceClassification", "SEQ_CLS", ("q_proj", "v_proj"), _LLAMA, 3
    ),
    "qwen3 classes": Trained(
        "Qwen3ForCausalLM", "AutoModelForSequenceClassification", "SEQ_CLS", ("o_proj", "v_proj"), _LLAMA, 3
    ),
    "mistral classes": Trained(
        "MistralForCausalLM",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        ("q_proj", "v_proj"),
        {**_LLAMA, "sliding_window": 4},
        3,
    ),
    "phi3 classes": Trained(
        "Phi3ForCausalLM",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        ("qkv_proj", "down_proj"),
        {key: value for key, value in _LLAMA.items() if key != "head_dim"},
        3,
    ),
    "gpt2 classes": Trained(
        "GPT2LMHeadModel",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        ("c_attn", "c_proj"),
        _GPT2,
        3,
        {"fan_in_fan_out": True},
    ),
}
