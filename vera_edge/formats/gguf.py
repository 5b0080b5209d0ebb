"""A GGUF file as a base: its tensors under Hugging Face's names, in Hugging Face's order, as plain floats.

The `gguf` package parses the file and dequantizes; what is ours is the mapping: names of Llama, Mistral,
Qwen2 and Qwen3, the rows of q and k that llama.cpp reorders for its rotary embedding, and a config.json from
the metadata. A quantized tensor reads as float32: GGUF is a source here, nothing writes it.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vera_edge.errors import CheckpointError, FormatError
from vera_edge.storage.json_text import read_json
from vera_edge.storage.tensors import DTYPES, Bytes, RawTensor, TensorFolder, TensorInfo

_FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
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
        self._reader = _open(file)
        self.metadata: Mapping[str, Any] = MappingProxyType(_metadata(self._reader, file))
        architecture = self.metadata.get("general.architecture")
        if architecture not in _CLASSES:
            raise FormatError(
                f"{file} holds a model of architecture {architecture!r}; vera-edge reads "
                f"{', '.join(_CLASSES)} from GGUF"
            )
        self._parts = dict(self._named(file, str(architecture)))
        super().__init__({name: _info(name, part, file) for name, part in self._parts.items()}, [file])

    def _named(self, file: Path, architecture: str) -> Iterator[tuple[str, Any]]:
        names = _names(architecture, self.number("block_count"))
        for tensor in self._reader.tensors:
            stem, _, suffix = tensor.name.rpartition(".")
            if tensor.name == _DERIVED:
                continue
            if stem not in names:
                raise FormatError(
                    f"tensor {tensor.name} of {file} has no known place in a {architecture} model"
                )
            yield f"{names[stem]}.{suffix}", tensor

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of the architecture's metadata."""
        name = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(name, default)
        if type(value) is not int or not 0 < value < 1 << 32:
            raise CheckpointError(f"{name} in the GGUF metadata is {value!r} where a positive number belongs")
        return value

    @property
    def scales_rope(self) -> bool:
        """Whether rotary embeddings are scaled, which only the original config.json tells fully."""
        kind = self.metadata.get(f"{self.metadata['general.architecture']}.rope.scaling.type", "none")
        return kind != "none" or any(tensor.name == _DERIVED for tensor in self._reader.tensors)

    def read(self, name: str) -> RawTensor:
        """One tensor, dequantized, rows in transformers' order."""
        import gguf

        part = self._parts[name]
        kind = part.tensor_type.name
        if kind in _QUANTIZED:
            data = RawTensor.of(gguf.quants.dequantize(part.data, part.tensor_type).reshape(self[name].shape))
        else:
            data = RawTensor(_FLOATS[kind], self[name].shape, np.array(part.data).reshape(-1).view(np.uint8))
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


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise FormatError(f"reading {file} needs the gguf package: pip install 'vera-edge[build]'") from None
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as cause:
        raise CheckpointError(
            f"{file} isn't a sound GGUF file ({cause}); copy or download it again"
        ) from None


def _metadata(reader: Any, file: Path) -> dict[str, Any]:
    """The metadata that is numbers and short texts; the tokenizer's lists are left out."""
    try:
        found = {key: each.contents() for key, each in reader.fields.items() if not _is_list(each)}
    except (ValueError, IndexError, KeyError, TypeError) as cause:
        raise CheckpointError(f"the metadata of {file} is damaged ({cause}); download it again") from None
    if int(found.get("split.count", 0)) > 1:
        raise FormatError(f"{file} is one part of a split model; join the parts with llama.cpp's gguf-split")
    return found


def _is_list(part: Any) -> bool:
    return bool(part.types) and part.types[0].name == "ARRAY"


def _names(architecture: str, blocks: int) -> dict[str, str]:
    """GGUF's name of each module -> transformers' name."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, blocks)
    modules = [*_OUTER, *(f"model.layers.{n}.{part}" for n in range(blocks) for part in _LAYER)]
    return {found: module for module in modules if (found := table.get_name(module)) is not None}


def _info(name: str, part: Any, file: Path) -> TensorInfo:
    """dtype and shape as `read` gives them; `start` is the tensor's place in the file."""
    kind = part.tensor_type.name
    if kind not in _QUANTIZED and kind not in _FLOATS:
        raise FormatError(
            f"tensor {part.name} of {file} is {kind}; vera-edge reads {', '.join((*_FLOATS, *_QUANTIZED))}"
        )
    dtype, shape = _FLOATS.get(kind, "F32"), tuple(int(size) for size in reversed(part.shape))
    start = int(part.data_offset)
    return TensorInfo(name, dtype, shape, file, start, start + math.prod(shape) * DTYPES[dtype][0])


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
    ids = {
        f"{name}_token_id": found.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
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
        "rms_norm_eps": float(found.get(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": float(found.get(f"{architecture}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_act": "silu",
        "dtype": "float32",
        **ids,
    }
