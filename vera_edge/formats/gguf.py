"""A GGUF file as a base: its tensors under Hugging Face's names, in Hugging Face's order, as plain floats.

The `gguf` package dequantizes; what is ours is the header, read as one that nobody vouches for, and the
mapping: names of Llama, Mistral, Qwen2 and Qwen3, the rows of q and k that llama.cpp reorders for its rotary
embedding, and a config.json from the metadata. A quantized tensor reads as float32: it is written by the
exporter vera_edge_gguf.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vera_edge.arrays import Bytes
from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats import gguf_header
from vera_edge.formats.gguf_header import GgufTensor
from vera_edge.storage.json_text import read_json
from vera_edge.storage.tensors import DTYPES, RawTensor, TensorFolder, TensorInfo

_FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# general.architecture -> transformers' class; llama.cpp calls Mistral "llama" too
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
# Frequencies that llama.cpp derives from config.json's rope scaling; the metadata doesn't say how.
_DERIVED = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(.+)", re.DOTALL)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder with one and no safetensors."""
    return path.suffix == ".gguf" or (path.is_dir() and not _safetensors(path) and bool(_files(path)))


def _safetensors(folder: Path) -> bool:
    return any(path.suffix == ".safetensors" for path in folder.iterdir())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file())


class GgufFolder(TensorFolder):
    """The tensors of one GGUF file, as `TensorFolder` gives those of safetensors."""

    def __init__(self, path: Path) -> None:
        """Read the metadata of a GGUF file, or of the only one in a folder.

        Raises CheckpointError when it's damaged or there are several, FormatError on an unknown architecture
        or tensor type.
        """
        file = _only_file(path)
        self._header = gguf_header.read(file)
        self.metadata: Mapping[str, Any] = MappingProxyType(self._header.metadata)
        _check_whole(self.metadata, file)
        architecture = self.metadata.get("general.architecture")
        if architecture not in _CLASSES:
            raise FormatError(
                f"{file} holds a model of architecture {architecture!r}; vera-edge reads "
                f"{', '.join(_CLASSES)} from GGUF"
            )
        self._parts = dict(self._named(file, str(architecture)))
        super().__init__({name: _info(name, part, file) for name, part in self._parts.items()}, [file])

    def _named(self, file: Path, architecture: str) -> Iterator[tuple[str, GgufTensor]]:
        names, blocks = _names(architecture), self.number("block_count")
        if blocks > len(self._header.tensors):
            raise CheckpointError(
                f"{file} claims {blocks} blocks and holds {len(self._header.tensors)} tensors; copy it again"
            )
        for tensor in self._header.tensors:
            stem, _, suffix = tensor.name.rpartition(".")
            if tensor.name == _DERIVED:
                continue
            block = _BLOCK.match(stem)
            if block is not None and int(block[1]) < blocks:
                module = names.get(f"blk.0.{block[2]}", "").replace(".0.", f".{block[1]}.", 1)
            else:
                module = names.get(stem, "") if block is None else ""
            if not module:
                raise FormatError(
                    f"tensor {tensor.name} of {file} has no known place in a {architecture} model"
                )
            yield f"{module}.{suffix}", tensor

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of the architecture's metadata."""
        name = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 32:
            raise CheckpointError(f"{name} in the GGUF metadata is {value!r} where a positive number belongs")
        return value

    def real(self, key: str, default: float) -> float:
        """A positive number of the architecture's metadata."""
        name = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{name} in the GGUF metadata is {value!r} where a positive number belongs")
        return float(value)

    @property
    def scales_rope(self) -> bool:
        """Whether rotary embeddings are scaled, which only the original config.json tells fully."""
        kind = self.metadata.get(f"{self.metadata['general.architecture']}.rope.scaling.type", "none")
        return kind != "none" or any(tensor.name == _DERIVED for tensor in self._header.tensors)

    def read(self, name: str) -> RawTensor:
        """One tensor, dequantized, rows in transformers' order."""
        import gguf

        part, shape = self._parts[name], self[name].shape
        stored = np.fromfile(self.files[0], np.uint8, part.nbytes, offset=part.start)
        if stored.size != part.nbytes:
            raise CheckpointError(f"{self.files[0]} ends inside tensor {part.name}; copy it again")
        if part.kind in _QUANTIZED:
            kind, rows = gguf.GGMLQuantizationType[part.kind], math.prod(shape[:-1])
            data = RawTensor.of(gguf.quants.dequantize(stored.reshape(rows, -1), kind).reshape(shape))
        else:
            data = RawTensor(_FLOATS[part.kind], shape, stored)
        if self.metadata["general.architecture"] == "llama":
            for projection, heads in (
                ("q_proj", "attention.head_count"),
                ("k_proj", "attention.head_count_kv"),
            ):
                if f".self_attn.{projection}." in name:
                    return self._unpermuted(
                        data, self.number(heads, self.number("attention.head_count")), name
                    )
        return data

    def pieces(self, name: str) -> Iterator[Bytes]:
        """One tensor's bytes, in one piece."""
        yield self.read(name).data

    def _unpermuted(self, raw: RawTensor, heads: int, name: str) -> RawTensor:
        """Undo llama.cpp's reordering: it interleaves the two halves of each head's rows."""
        rows, rest = raw.shape[0], raw.shape[1:]
        if rows % (2 * heads):
            raise CheckpointError(
                f"{name} has {rows} rows in GGUF, which aren't {heads} heads of an even size"
            )
        parts = raw.array().reshape(heads, rows // heads // 2, 2, *rest)
        return RawTensor.of(parts.swapaxes(1, 2).reshape(raw.shape), raw.dtype)


def _only_file(path: Path) -> Path:
    files = [path] if path.suffix == ".gguf" else _files(path)
    if len(files) != 1:
        raise CheckpointError(f"{path} holds several GGUF files; give the path of one")
    if not files[0].is_file():
        raise CheckpointError(f"{files[0]} isn't there")
    return files[0]


def _names(architecture: str) -> dict[str, str]:
    """GGUF's name of each module -> transformers' name; those of a block as of the first one."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, 1)
    modules = [*_OUTER, *(f"model.layers.0.{part}" for part in _LAYER)]
    return {found: module for module in modules if (found := table.get_name(module)) is not None}


def _check_whole(metadata: Mapping[str, Any], file: Path) -> None:
    parts = metadata.get("split.count", 0)
    if type(parts) is int and parts > 1:
        raise FormatError(f"{file} is one part of a split model; join the parts with llama.cpp's gguf-split")


def _info(name: str, part: GgufTensor, file: Path) -> TensorInfo:
    """dtype and shape as `read` gives them; `start` is the tensor's place in the file."""
    kind = part.kind
    if kind not in _QUANTIZED and kind not in _FLOATS:
        raise FormatError(
            f"tensor {part.name} of {file} is {kind}; vera-edge reads {', '.join((*_FLOATS, *_QUANTIZED))}"
        )
    dtype = _FLOATS.get(kind, "F32")
    end = part.start + math.prod(part.shape) * DTYPES[dtype][0]
    return TensorInfo(name, dtype, part.shape, file, part.start, end)


def open_model(path: Path) -> tuple[TensorFolder, dict[str, Any]]:
    """A GGUF model's tensors, and its config: the config.json beside it, else made from the metadata."""
    tensors = GgufFolder(path)
    beside = tensors.files[0].parent / "config.json"
    return tensors, read_json(beside, CheckpointError) if beside.is_file() else config_of(tensors)


def config_of(tensors: GgufFolder) -> dict[str, Any]:
    """The config.json of a GGUF model without one beside it.

    Raises FormatError when its rotary embeddings are scaled: the metadata doesn't hold all that config.json
    says.
    """
    if tensors.scales_rope:
        raise FormatError(
            f"{tensors.files[0]} scales its rotary embeddings; put the original model's config.json beside it"
        )
    found, number = tensors.metadata, tensors.number
    architecture = str(found["general.architecture"])
    hidden, heads = number("embedding_length"), number("attention.head_count")
    if "model.embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{tensors.files[0]} has no token_embd.weight, so it is no whole model")
    ids = {
        f"{name}_token_id": found.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    if strange := [name for name, value in ids.items() if value is not None and type(value) is not int]:
        raise CheckpointError(f"{strange[0]} in the metadata of {tensors.files[0]} is no number of a token")
    return {
        "model_type": architecture,
        "architectures": [_CLASSES[architecture]],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", hidden // heads),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": tensors.real("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": tensors.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_act": "silu",
        "dtype": "float32",
        **ids,
    }
