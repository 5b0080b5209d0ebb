"""Tiny random models of many families, each with a VeRA adapter that PEFT made on its linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny

VOCABULARY = 96
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = {key: value for key, value in _TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "key", "value", "dense")


@dataclass(frozen=True)
class Family:
    """A model family in transformers.

    config: of `<model>`'s config class. targets: what the adapter is put on. peculiar: what is unlike a plain
    stack of nn.Linear, for the table in the docs.
    """

    model: str
    targets: Sequence[str]
    config: Mapping[str, Any] = field(default_factory=lambda: _TEXT)
    peculiar: str = ""
    adapter: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The model with random weights, in float32."""
        import torch
        import transformers

        cls = getattr(transformers, self.model)
        torch.manual_seed(sum(map(ord, self.model)))
        config = cls.config_class(**self.config)
        return cls(config).eval()

    def inputs(self) -> dict[str, Any]:
        """Inputs for one forward pass."""
        import torch

        draw = torch.Generator().manual_seed(5)
        tokens = torch.randint(3, VOCABULARY, (1, 12), generator=draw)
        if "ViT" in self.model:
            return {"pixel_values": torch.randn(1, 3, 16, 16, generator=draw)}
        if "Whisper" in self.model:
            frames = torch.randn(1, 16, 64, generator=draw)
            return {"input_features": frames, "decoder_input_ids": tokens}
        if "T5" in self.model:
            return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}
        return {"input_ids": tokens}

    def adapted(self, base: Path, folder: Path) -> Path:
        """A VeRA adapter on the model in `base`, made and saved by PEFT."""
        from peft import VeraConfig, get_peft_model

        settings = VeraConfig(
            r=8,
            projection_prng_key=7,
            target_modules=list(self.targets),
            save_projection=False,
            **self.adapter,
        )
        model = get_peft_model(self.load(base), settings)
        tiny.randomize(model, 0.5, 3)
        model.save_pretrained(folder)
        return folder

    def load(self, folder: Path) -> Any:
        """The model in a folder, in float32."""
        import torch
        import transformers

        return getattr(transformers, self.model).from_pretrained(folder, dtype=torch.float32).eval()


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", _LLAMA),
    "mistral": Family("MistralForCausalLM", _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA, peculiar="biases on q, k, v"),
    "qwen3": Family("Qwen3ForCausalLM", _LLAMA, peculiar="norms on q and k"),
    "gemma2": Family("Gemma2ForCausalLM", _LLAMA, {**_TEXT, "query_pre_attn_scalar": 8}, "tied embeddings"),
    "gemma3": Family("Gemma3ForCausalLM", _LLAMA, {**_TEXT, "query_pre_attn_scalar": 8}, "tied embeddings"),
    "phi3": Family(
        "Phi3ForCausalLM",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        {key: value for key, value in _TEXT.items() if key != "head_dim"},
        "q, k, v in one weight; gate and up in one",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        ("c_attn", "c_proj", "c_fc"),
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "weights stored transposed (Conv1D), q, k, v in one",
        {"fan_in_fan_out": True},
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        _ENCODER,
        "q, k, v in one weight, interleaved by head",
    ),
    "opt": Family(
        "OPTForCausalLM",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"),
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.15,
            "dropout": 0.0,
        },
        "embeddings narrower than the model",
    ),
    "bert": Family("BertForMaskedLM", _BERT, _ENCODER, "names under bert.; a head tied to the embeddings"),
    "roberta": Family("RobertaModel", _BERT, {**_ENCODER, "pad_token_id": 1}, "a bare encoder"),
    "vit": Family(
        "ViTForImageClassification",
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "initializer_range": 0.15,
        },
        "images in; transformers renames the checkpoint's layers",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        "encoder and decoder, cross-attention, shared embeddings",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 64,
            "init_std": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "sound in; encoder and decoder; k without bias",
    ),
}
