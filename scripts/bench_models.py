"""Synthetic Llamas for the benches: bases of any size with random weights, and VeRA adapters for them.

Made by code, tensor by tensor, so that a base of 8 billion weights takes the memory of one tensor. The
weights are normal with a deviation of 0.02, as before training; what a layer costs doesn't depend on them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vera_edge import merging
from vera_edge.arrays import Float32
from vera_edge.storage.json_text import canonical_json
from vera_edge.storage.shards import Shards, ShardWriter
from vera_edge.storage.tensors import RawTensor, float32_to_bf16
from vera_edge.text import windows

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD_BYTES = 500_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_POSITIONS = 2048
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Size:
    """The widths of a Llama. `layers`: that are made, of `all_layers` that the model would have."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True
    left_out: int = 0

    @property
    def all_layers(self) -> int:
        return self.layers + self.left_out

    def of_layers(self, count: int | None) -> Size:
        """The same model with its first `count` layers alone; None or more than there are: all."""
        if count is None or count >= self.layers:
            return self
        return replace(self, layers=count, left_out=self.all_layers - count)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's linears, by their name in it."""
        narrow, wide, inner = self.hidden // self.heads * self.kv_heads, self.hidden, self.inner
        attention = {"q_proj": (wide, wide), "k_proj": (narrow, wide), "v_proj": (narrow, wide)}
        attention["o_proj"] = (wide, wide)
        mlp = {"gate_proj": (inner, wide), "up_proj": (inner, wide), "down_proj": (wide, inner)}
        return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear, by module."""
        numbers = range(self.layers)
        return {f"model.layers.{n}.{name}": shape for n in numbers for name, shape in self.shapes().items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the checkpoint, by name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        shapes |= {f"{module}.weight": shape for module, shape in self.linears().items()}
        for number in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{number}.{name}.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def linear_weights(self) -> int:
        return sum(out * inside for out, inside in self.linears().values())

    @property
    def table_weights(self) -> int:
        """Of the embeddings, and of the head where it is a matrix of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def float32_bytes(self) -> int:
        """Bytes of the whole model in float32, what the others are held against."""
        return 4 * sum(int(np.prod(shape)) for shape in self.tensors().values())


# The proportions of SmolLM2 (0.13b), Qwen2.5 (0.5b, 1.5b, 7b) and Llama 3 (1.2b, 3b, 8b).
SIZES = {
    "tiny": Size(256, 512, 2, 4, 2, 1000),
    "0.13b": Size(576, 1536, 30, 9, 3, 49_152),
    "0.5b": Size(896, 4864, 24, 14, 2, 151_936),
    "1.2b": Size(2048, 8192, 16, 32, 8, 128_256),
    "1.5b": Size(1536, 8960, 28, 12, 2, 151_936),
    "3b": Size(3072, 8192, 28, 24, 8, 128_256),
    "7b": Size(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "8b": Size(4096, 14_336, 32, 32, 8, 128_256, tied=False),
}


def make(
    size: Size,
    rank: int,
    folder: Path,
    sources: Collection[str],
    tokenizer: Path | None = None,
    lora: bool = False,
) -> None:
    """`adapter` (a VeRA's, or `lora`'s) and the bases of `sources` ("bf16", "nf4") in `folder`, those that
    aren't there yet.

    Each is put in its place when it is whole. tokenizer: a folder with one whose tokens the vocabulary holds;
    without it one is trained on the built-in text.
    """
    dense, adapter = folder / "bf16", folder / ("lora" if lora else "adapter")
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / source).exists() for source in sources) and not dense.exists():
        make_base(size, _begin(folder), tokenizer)
        (folder / "making").rename(dense)
    if not adapter.exists():
        (make_lora if lora else make_adapter)(size, rank, dense, _begin(folder))
        (folder / "making").rename(adapter)
    if "nf4" in sources and not (folder / "nf4").exists():
        # With a weight of 0 the adapter adds nothing: a merge is then the way to quantize layer by layer.
        merging.to_folder(dense, [(adapter, 0.0)], folder / "nf4", "nf4", {"double_quant": True})


def _begin(folder: Path) -> Path:
    making = folder / "making"
    shutil.rmtree(making, ignore_errors=True)  # what a broken-off run left
    return making


def make_base(size: Size, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the bf16 base, sharded, with its tokenizer; one tensor in memory."""
    folder.mkdir(parents=True)
    shapes = size.tensors()
    pool = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
    with ShardWriter(Shards(folder, {n: ("BF16", s) for n, s in shapes.items()}, SHARD_BYTES)) as writer:
        for number, (name, shape) in enumerate(shapes.items()):
            values = np.resize(np.roll(pool, 9973 * number), shape) + np.float32("norm" in name)
            writer.write(name, RawTensor.of(float32_to_bf16(values), "BF16"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "max_position_embeddings": _POSITIONS,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": size.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    (folder / "config.json").write_bytes(canonical_json(config))
    if tokenizer is None:
        train_tokenizer(folder, size.vocabulary)
    else:
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, folder / name)


def make_adapter(size: Size, rank: int, base: Path, folder: Path) -> None:
    """Write a VeRA adapter as PEFT does, with random vectors."""
    from peft import VeraConfig

    rng = np.random.default_rng(1)
    tensors: dict[str, Float32] = {}
    for module, (out, _) in size.linears().items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.vera_lambda_b"] = (rng.standard_normal(out) * 0.1).astype(np.float32)
        tensors[f"{prefix}.vera_lambda_d"] = np.full(rank, 0.1, np.float32)
    settings = VeraConfig(
        r=rank,
        projection_prng_key=3,
        target_modules=list(LINEARS),
        save_projection=False,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


def make_lora(size: Size, rank: int, base: Path, folder: Path) -> None:
    """Write a LoRA adapter on all linears as PEFT does, with random pairs."""
    from peft import LoraConfig

    rng = np.random.default_rng(1)
    tensors: dict[str, Float32] = {}
    for module, (out, inside) in size.linears().items():
        for name, shape in (("lora_A", (rank, inside)), ("lora_B", (out, rank))):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.01)
            tensors[f"base_model.model.{module}.{name}.weight"] = values
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


def train_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level BPE of at most `vocabulary` tokens in `folder`, trained on the built-in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 8192),
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(windows.read_text(windows.BUILT_IN).content.splitlines(), trainer)
    tokenizer.save(str(folder / TOKENIZER_FILES[0]))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[1],
        "eos_token": _SPECIAL[2],
        "pad_token": _SPECIAL[2],
        "unk_token": _SPECIAL[0],
        "model_max_length": _POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_FILES[1]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / TOKENIZER_FILES[2]).write_text(template, encoding="utf-8")
