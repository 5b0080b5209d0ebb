"""Readers of a base: safetensors, their index, GGUF, and config.json beside weights of every format."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge import formats
from vera_edge.base.checkpoint import MERGE_RECORD, Checkpoint
from vera_edge.merging.config import merged_config
from vera_edge.plans import plan as plans
from vera_edge.storage.json_text import settings_json
from vera_edge.storage.tensors import write_header

GOLDEN = Path(__file__).parents[1] / "golden" / "formats"
WIDTH, INNER, KEYS, WORDS = 64, 160, 32, 8
Arrays = dict[str, npt.NDArray[Any]]
_SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": [1, 2],
}


def arrays() -> Arrays:
    """The float tensors of a model that the golden adapters fit."""
    draw = np.random.default_rng(4)
    found = {"model.embed_tokens.weight": draw.standard_normal((WORDS, WIDTH), np.float32)}
    for layer in range(2):
        for name, shape in _SHAPES.items():
            found[f"model.layers.{layer}.{name}.weight"] = draw.standard_normal(shape, np.float32)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = np.ones(WIDTH, np.float32)
    return found | {"model.norm.weight": np.ones(WIDTH, np.float32)}


def write_base(folder: Path) -> Path:
    """A base in float32."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def whole(folder: Path) -> Checkpoint:
    """A base opened, and every weight of it read."""
    checkpoint = Checkpoint.open(folder)
    _ = checkpoint.layout_digest, checkpoint.notes, checkpoint.merged, checkpoint.quantized
    for module, linear in checkpoint.linears.items():
        checkpoint.dequantize(module)
        formats.get(linear.format).options_of(linear)
    for name in checkpoint.other_names:
        checkpoint.tensors.read(name)
    for weights in ("same", "fp32"):
        settings_json(merged_config(plans.make(checkpoint, [], weights=weights), checkpoint, untied=True))
    return checkpoint


def _small() -> Arrays:
    draw = np.random.default_rng(5)
    return {
        "model.layers.0.mlp.up_proj.weight": draw.standard_normal((6, 4), np.float32),
        "model.layers.0.mlp.down_proj.weight": draw.standard_normal((4, 6)).astype(np.float16),
        "model.norm.weight": np.ones(4, np.float32),
    }


def _safetensors() -> Target:
    from safetensors.numpy import save

    def read(seed: Seed, folder: Path) -> object:
        (folder / "model.safetensors").write_bytes(seed.data)
        return whole(folder)

    seeds = [Seed(save(_small(), {"format": "pt"})), Seed(save(_small()))]
    return Target("safetensors", Form.SAFETENSORS, lambda: seeds, read, _config)


def _config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))


def _index() -> Target:
    names = list(_small())
    where = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    value = {"metadata": {"total_size": 148}, "weight_map": where}

    def prepare(folder: Path) -> None:
        from safetensors.numpy import save_file

        _config(folder)
        for file in set(where.values()):
            save_file({name: _small()[name] for name in names if where[name] == file}, folder / file)

    def read(seed: Seed, folder: Path) -> object:
        (folder / "model.safetensors.index.json").write_bytes(seed.data)
        return whole(folder)

    return Target("safetensors-index", Form.JSON, lambda: [Seed(json.dumps(value).encode())], read, prepare)


@cache
def _stored(method: str) -> dict[str, dict[str, bytes]]:
    """The files of small quantized bases by case: those that the method's own library wrote, or ours."""
    if method == "bitsandbytes":
        return {name: _written(name) for name in ("nf4", "fp4", "int8")}
    folders = sorted(path.parent for path in (GOLDEN / method).glob("*/config.json"))
    names = ("config.json", "model.safetensors")
    return {folder.name: {name: (folder / name).read_bytes() for name in names} for folder in folders}


def _written(name: str) -> dict[str, bytes]:
    form = formats.get(name)
    options = form.options({})
    weight = form.quantize(np.random.default_rng(6).standard_normal((64, 128), np.float32), options)
    stored = {f"model.layers.0.mlp.up_proj{suffix}": raw for suffix, raw in weight.tensors().items()}
    with BytesIO() as stream:
        write_header(stream, {key: (raw.dtype, raw.shape) for key, raw in stored.items()}, {"format": "pt"})
        data = stream.getvalue() + b"".join(raw.data.tobytes() for raw in stored.values())
    config = {**CONFIG, "quantization_config": form.quantization_config(options)}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": data}


def _put(cases: dict[str, dict[str, bytes]], folder: Path) -> None:
    for case, files in cases.items():
        (folder / case).mkdir()
        for name, data in files.items():
            (folder / case / name).write_bytes(data)


METHODS = ("awq", "bitsandbytes", "compressed_tensors", "fp8", "gptq", "hqq", "torchao")


def _of_method(method: str, file: str, form: Form) -> Target:
    """One file of a quantized base, beside the other as it was."""

    def read(seed: Seed, folder: Path) -> object:
        (folder / seed.beside / file).write_bytes(seed.data)
        try:
            return whole(folder / seed.beside)
        finally:
            (folder / seed.beside / file).write_bytes(_stored(method)[seed.beside][file])

    def seeds() -> list[Seed]:
        return [Seed(files[file], case) for case, files in _stored(method).items()]

    name = f"config-{method}" if form is Form.JSON else f"weights-{method}"
    return Target(name.replace("_", "-"), form, seeds, read, lambda folder: _put(_stored(method), folder))


def _merge_record() -> Target:
    value = {"report": {"adapters": [{"digest": "0" * 64, "name": "a"}]}}

    def read(seed: Seed, folder: Path) -> object:
        (folder / MERGE_RECORD).write_bytes(seed.data)
        return Checkpoint.open(folder).merged

    return Target("merge-record", Form.JSON, lambda: [Seed(json.dumps(value).encode())], read, write_base)


def _gguf() -> Target:
    def read(seed: Seed, folder: Path) -> object:
        (folder / "model.gguf").write_bytes(seed.data)
        return whole(folder)

    return Target("gguf", Form.BINARY, gguf_seeds, read)


@cache
def gguf_seeds() -> list[Seed]:
    """A one-layer Llama with floats, and one with quantized linears."""
    import gguf

    seeds = []
    for kind in ("F32", "Q8_0", "Q4_0"):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "model.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            for key, number in _GGUF_NUMBERS.items():
                getattr(writer, f"add_{key}")(number)
            writer.add_token_list([f"t{n}".encode() for n in range(4)])
            for tensor, *shape in _GGUF:
                values = np.ones(shape, np.float32)
                quantized = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
                writer.add_tensor(tensor, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
            for finish in (
                writer.write_header_to_file,
                writer.write_kv_data_to_file,
                writer.write_tensors_to_file,
            ):
                finish()
            writer.close()
            seeds.append(Seed(path.read_bytes()))
    return seeds


_GGUF_NUMBERS = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "head_count": 2,
    "head_count_kv": 1,
}
_GGUF: tuple[tuple[Any, ...], ...] = (
    ("token_embd.weight", 4, 32), ("output_norm.weight", 32), ("blk.0.attn_norm.weight", 32),
    ("blk.0.attn_q.weight", 32, 32), ("blk.0.attn_k.weight", 16, 32), ("blk.0.ffn_down.weight", 32, 64),
)  # fmt: skip
TARGETS = (
    _safetensors(),
    _index(),
    _gguf(),
    _merge_record(),
    *(_of_method(method, "config.json", Form.JSON) for method in METHODS),
    *(_of_method(method, "model.safetensors", Form.SAFETENSORS) for method in METHODS),
)
