"""Tiny models made in code: real architectures, real tokenizers, real PEFT and bitsandbytes, in seconds.

Widths differ wherever two could be mixed up (hidden 64, intermediate 160, key/value 32), and the weights are
drawn wide enough that logits are far from uniform, so that drift and argmax mean something.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPT2_LINEARS = ("c_attn", "c_proj", "c_fc")
VOCABULARY = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = """\
The adapter scales each row of one shared random projection and each column of another.
A weight of the base layer keeps its bytes, and the side-branch adds what the adapter learned.
Merge the two in float32, then quantize again: a small delta may fall between the grid points.
"""


class TinyLlama:
    """A two-layer Llama in every weight format, each folder made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def fp32(self) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.15,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        return save(model, self.root / "fp32")

    @cached_property
    def bf16(self) -> Path:
        return self._cast("bf16", "bfloat16")

    @cached_property
    def fp16(self) -> Path:
        return self._cast("fp16", "float16")

    @cached_property
    def sharded(self) -> Path:
        """fp32 in several shards with an index."""
        return save(load(self.fp32), self.root / "sharded", max_shard_size="200KB")

    @cached_property
    def nf4(self) -> Path:
        """NF4 with double quantization, float32 compute: the format QLoRA bases have."""
        return self._quantize("nf4", **four_bit("nf4"))

    @cached_property
    def fp4(self) -> Path:
        """FP4 without double quantization."""
        return self._quantize("fp4", **four_bit("fp4", double=False))

    @cached_property
    def int8(self) -> Path:
        """LLM.int8."""
        return self._quantize("int8", load_in_8bit=True)

    def _cast(self, name: str, dtype: str) -> Path:
        import torch

        return save(load(self.fp32, dtype=getattr(torch, dtype)), self.root / name)

    def _quantize(self, name: str, **options: Any) -> Path:
        return quantize(self.fp32, self.root / name, **options)


def make_gpt2(folder: Path) -> Path:
    """A two-layer GPT-2 in fp32: its linears are Conv1D, which store (in, out)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_inner=160,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(8)
    return save(GPT2LMHeadModel(config), folder)


def four_bit(kind: str, double: bool = True, compute: str = "float32", **more: Any) -> dict[str, Any]:
    """Options of BitsAndBytesConfig for a 4-bit base."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": compute,
        **more,
    }


def quantize(source: Path, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    """`source` quantized by bitsandbytes and saved by transformers."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**options)
    model = load(source, dtype=getattr(torch, dtype), quantization_config=config)
    return save(model, folder)


def load(folder: Path, **options: Any) -> Any:
    """The causal LM in `folder`, on the CPU, in float32 unless told."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "device_map": "cpu", **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model with the tiny tokenizer beside it."""
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 384 tokens, trained on three sentences, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def make_adapter(
    base: Path,
    folder: Path,
    *,
    rank: int = 8,
    seed: int = 31,
    targets: Sequence[str] = LLAMA_LINEARS,
    strength: float = 0.25,
    vectors_seed: int = 5,
    load_options: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A VeRA adapter on `base`, made and saved by PEFT, with seeded vectors as if trained.

    `strength` is the scale of lambda_b; 0.25 makes a delta of a few per cent of the weight. `config` goes to
    VeraConfig (save_projection, layers_to_transform, bias, fan_in_fan_out, modules_to_save, ...).
    """
    import torch
    from peft import VeraConfig, get_peft_model

    options = {"save_projection": False, "task_type": "CAUSAL_LM", **config}
    settings = VeraConfig(r=rank, projection_prng_key=seed, target_modules=list(targets), **options)
    model = get_peft_model(load(base, **(load_options or {})), settings)
    randomize(model, strength, vectors_seed)
    with torch.no_grad():
        model.save_pretrained(folder)
    return folder


def randomize(model: Any, strength: float, seed: int) -> None:
    """Give every lambda vector of a PEFT model seeded values: b around 0, d around 0.5."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "vera_lambda_b" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * strength)
            elif "vera_lambda_d" in name:
                parameter.copy_(0.5 + 0.2 * torch.randn(parameter.shape, generator=draw))
