"""GGUF files as bases: held against what transformers loads from the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, FormatError

WIDTH, BLOCKS, VOCABULARY = 256, 2, 32
# what gguf can quantize itself, and what is filled with random blocks of sane scales
SIMPLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BLOCKWISE = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def _blocks(kind: str, shape: tuple[int, int], draw: np.random.Generator) -> Any:
    """Random bytes as k-quant blocks; the float16 scales in them are small."""
    size = BLOCKWISE[kind]
    data = draw.integers(0, 256, (shape[0] * shape[1] // 256, size), dtype=np.uint8)
    for place in SCALES_AT[kind]:
        data[:, place : place + 2] = draw.uniform(0.001, 0.01, (len(data), 1)).astype("<f2").view(np.uint8)
    return data.reshape(shape[0], -1)


def _write(path: Path, architecture: str, kind: str, change: Callable[[Any], None] | None = None) -> Path:
    """A tiny model with every linear of the given type."""
    import gguf

    draw = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}".encode() for n in range(VOCABULARY)])
    writer.add_token_merges([])
    if change is not None:
        change(writer)

    def add(name: str, *shape: int) -> None:
        values = draw.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1 or name.startswith("token"):
            writer.add_tensor(f"{name}", values)
        elif kind in BLOCKWISE:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, _blocks(kind, (shape[0], shape[1]), draw), raw_dtype=quantized)
        else:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    for n in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("ffn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", 2 * WIDTH, WIDTH),
            ("ffn_up", 2 * WIDTH, WIDTH),
            ("ffn_down", WIDTH, 2 * WIDTH),
        ):
            add(f"blk.{n}.{name}.weight", *shape)
        if architecture == "qwen2":
            for name, size in (("attn_q", WIDTH), ("attn_k", WIDTH // 2), ("attn_v", WIDTH // 2)):
                add(f"blk.{n}.{name}.bias", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _loaded_by_transformers(path: Path) -> dict[str, Float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_tensor_is_what_transformers_loads(architecture: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", architecture, "Q5_0")
    expected = _loaded_by_transformers(path)
    expected.pop("lm_head.weight")
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.tensors) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.float32(name), values, err_msg=name)
    assert checkpoint.config["model_type"] == architecture
    assert len(checkpoint.linears) == 7 * BLOCKS
    assert checkpoint.dequantize("model.layers.1.mlp.down_proj").shape == (WIDTH, 2 * WIDTH)


@pytest.mark.parametrize("kind", [*SIMPLE, *BLOCKWISE])
def test_every_type_is_what_transformers_dequantizes(kind: str, tmp_path: Path) -> None:
    """transformers has a dequantization of its own, in torch; ours is the gguf package's."""
    import gguf
    import torch
    from transformers.integrations.gguf import dequant

    path = _write(tmp_path / "tiny.gguf", "llama", kind)
    name = "blk.0.ffn_down.weight"
    part = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    ours = Checkpoint.open(tmp_path).dequantize("model.layers.0.mlp.down_proj")
    if kind in ("F32", "F16", "BF16"):
        view = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        theirs = torch.from_numpy(np.array(part.data)).view(view).float().reshape(ours.shape)
    else:
        data = torch.from_numpy(np.array(part.data))
        if kind in ("Q5_0", "Q5_1"):  # which transformers leaves to the gguf package
            theirs = torch.tensor(_five_bits(np.array(part.data), kind)).reshape(ours.shape)
            np.testing.assert_array_equal(ours, theirs.numpy())
            return
        theirs = dequant.dequantize(data, part.tensor_type, torch.float32).reshape(ours.shape)
    np.testing.assert_array_equal(ours, theirs.numpy())


def _five_bits(data: Any, kind: str) -> list[list[np.float32]]:
    """Q5_0 and Q5_1 read value by value, as ggml's block_q5_0 and block_q5_1 lay them out."""
    size = 22 if kind == "Q5_0" else 24
    values = []
    for block in data.reshape(-1, size)[:, :]:
        scale, least = (np.float32(part) for part in block[:4].view("<f2"))
        high, low = int(block[-20:-16].view("<u4")[0]), [int(byte) for byte in block[-16:]]
        codes = [byte & 15 for byte in low] + [byte >> 4 for byte in low]
        codes = [code | (high >> n & 1) << 4 for n, code in enumerate(codes)]
        if kind == "Q5_0":
            values.append([scale * np.float32(code - 16) for code in codes])
        else:
            values.append([scale * np.float32(code) + least for code in codes])
    return values


def test_the_config_beside_it_is_taken(tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", "llama", "Q8_0", _scaled_rope)
    with pytest.raises(FormatError, match=r"put the original model's config\.json beside it"):
        Checkpoint.open(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rope_scaling": {"factor": 8}}')
    assert Checkpoint.open(tmp_path).config["rope_scaling"] == {"factor": 8}


def _scaled_rope(writer: Any) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.gguf", "gemma2", "Q8_0")
    with pytest.raises(FormatError, match="architecture 'gemma2'; vera-edge reads llama, qwen2, qwen3"):
        Checkpoint.open(path)
    _write(tmp_path / "b.gguf", "llama", "Q8_0")
    with pytest.raises(CheckpointError, match="holds several GGUF files"):
        Checkpoint.open(tmp_path)
    path.write_bytes((tmp_path / "b.gguf").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="isn't a sound GGUF file"):
        Checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"c\.gguf isn't there"):
        Checkpoint.open(tmp_path / "c.gguf")

    def extra(writer: Any) -> None:
        writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 4, 4), np.float32))

    path = _write(tmp_path / "d.gguf", "llama", "Q8_0", extra)
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_gate_exps\.weight of .* has no known place"):
        Checkpoint.open(path)
