"""llama.cpp's own quantizer, by llama-cpp-python, on the demo's merged weights.

The file it is given holds the weights of a Llama by llama.cpp's names, in the order that transformers keeps
their rows (llama.cpp would run q and k in another one, which rounding row by row takes no notice of).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, quants

from scripts import bench_llama_cpp
from scripts.bench_drift_rows import Made
from scripts.prepare_demo import Demo
from vera_edge import merging as merge
from vera_edge.precision.trained import trained_model
from vera_edge.reference.model import TorchReference

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TABLE = "token_embd.weight"


def quantized(demo: Demo, out: Path, kind: str) -> Made:
    """The merged model quantized to `kind` ("Q4_K_M") and read back; measured in torch in float32."""
    import llama_cpp

    model = trained_model(merge.prepare(demo.base, [(demo.adapter, 1.0)]))
    names = {_theirs(name, model.config.num_hidden_layers): name for name, _ in model.named_parameters()}
    before, after = out / "merged-f32.gguf", out / f"{kind}.gguf"
    _write(before, model, names)
    bench_llama_cpp.quantize(llama_cpp, str(before), str(after), kind)
    stored = weights = 0
    for tensor in GGUFReader(after).tensors:
        values = np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        parameter = model.get_parameter(names[tensor.name])
        parameter.data = torch.from_numpy(values.reshape(parameter.shape))
        if values.ndim == 2 and tensor.name != _TABLE:
            stored, weights = stored + int(tensor.n_bytes), weights + values.size
    runner = TorchReference(model, int(model.config.vocab_size), has_adapter=False)
    return Made(runner, 8 * stored / weights, after.stat().st_size)


def _theirs(name: str, layers: int) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    ends = {"model.embed_tokens.weight": _TABLE, "model.norm.weight": "output_norm.weight"}
    if name in ends:
        return ends[name]
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    assert int(number) < layers
    return f"blk.{number}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _write(path: Path, model: Any, names: dict[str, str]) -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for theirs, ours in names.items():
        writer.add_tensor(theirs, model.get_parameter(ours).detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
