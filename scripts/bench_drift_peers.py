"""Other tools' quantizers on the same merged weights, as rows of the drift tables.

ONNX Runtime GenAI's builder writes a graph that runs as it is. Of HQQ and llama.cpp the weights are measured
alone, dequantized and run in torch: what their kernels add isn't in these rows. Both need packages that
vera-edge doesn't (hqq, llama-cpp-python); a peer whose package isn't there is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from scripts.bench_drift_rows import Made, Way
from scripts.prepare_demo import Demo
from vera_edge import merging as merge
from vera_edge.measuring.artefact import folder_bytes
from vera_edge.precision.trained import trained_model
from vera_edge.reference.model import TorchReference

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
# Of a weight (out, in): what a quantizer makes of it, and how many bytes it stores.
Rounded = Callable[[Float32], tuple[Float32, float]]
_BUILDER = (
    ("ONNX Runtime GenAI builder, int4 rtn", "rtn_last"),
    ("ONNX Runtime GenAI builder, int4 k_quant", "k_quant_last"),
    ("ONNX Runtime GenAI builder, int4 k_quant_mixed", "k_quant_mixed"),
)


def peers(demo: Demo, out: Path) -> Iterator[Way]:
    """Every peer whose packages are there."""
    genai = f"onnxruntime-genai {version('onnxruntime-genai')}"
    for name, algorithm in _BUILDER:
        yield Way(name, partial(_builder, demo, out, algorithm), genai)
    if find_spec("hqq"):
        facts = f"hqq {version('hqq')}"
        for group in (64, 32):
            rounded = partial(_hqq, group)
            yield Way(f"HQQ, 4 bits in groups of {group}", partial(_weights_alone, demo, rounded), facts)
    for kind in ("Q4_0", "Q8_0"):
        rounded = partial(_ggml, kind)
        facts = f"gguf {version('gguf')}"
        yield Way(f"llama.cpp {kind}", partial(_weights_alone, demo, rounded, partial(_ggml, "Q8_0")), facts)
    if find_spec("llama_cpp"):
        from scripts.bench_drift_llama import quantized

        facts = f"llama-cpp-python {version('llama-cpp-python')}"
        yield Way("llama.cpp Q4_K_M", partial(quantized, demo, out, "Q4_K_M"), facts)


def _builder(demo: Demo, out: Path, algorithm: str) -> Made:
    """The builder's own int4 of the merged float model: blocks of 32, the head in int8, as ours."""
    merged, folder = out / "merged-fp32", out / f"builder-{algorithm}"
    if not merged.is_dir():
        ready = merge.prepare(demo.base, [(demo.adapter, 1.0)], "fp32")
        merge.perform(ready, merged)
    options = (f"algo_config={algorithm}", "block_size=32", "accuracy_level=4")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", merged, "-o", folder]
    command += ["-p", "int4", "-e", "cpu", "-c", out / "cache", "--extra_options", *options]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return Made(_Graph.open(folder), _bits(folder / "model.onnx"), folder_bytes(folder))


def _bits(path: Path) -> float:
    """Bits of a weight of the layers' MatMulNBits, scales and zero points included."""
    graph = onnx.load(path, load_external_data=False).graph
    width = {onnx.TensorProto.FLOAT: 32, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.UINT8: 8}
    stored = {t.name: int(np.prod(t.dims)) * width[t.data_type] for t in graph.initializer if t.dims}
    bits = weights = 0
    for node in graph.node:
        if node.op_type == "MatMulNBits" and "lm_head" not in node.name:
            size = {one.name: one.i for one in node.attribute}
            weights += size["K"] * size["N"]
            bits += sum(stored[name] for name in node.input[1:] if name in stored)
    return bits / weights


@dataclass(frozen=True)
class _Graph:
    """A decoder graph of the builder in plain ONNX Runtime, the cache empty."""

    session: ort.InferenceSession
    vocab_size: int
    cache: tuple[int, int]  # heads and their size

    @classmethod
    def open(cls, folder: Path) -> _Graph:
        session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        model = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        return cls(session, model["vocab_size"], (decoder["num_key_value_heads"], decoder["head_size"]))

    def logits(self, tokens: Int64) -> Float32:
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, len(tokens)), np.int64),
        }
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((1, self.cache[0], 0, self.cache[1]), np.float32)
        found: Float32 = self.session.run(["logits"], feeds)[0][0]
        return found


def _weights_alone(demo: Demo, layers: Rounded, ends: Rounded | None = None) -> Made:
    """Every linear layer's weight rounded by `layers`, embeddings and head (one matrix) by `ends`."""
    ready = merge.prepare(demo.base, [(demo.adapter, 1.0)])
    model = trained_model(ready)
    stored = weights = 0.0
    for module in ready.model.checkpoint.linears:
        parameter = model.get_submodule(module).weight
        values, size = layers(parameter.detach().numpy())
        parameter.data = torch.from_numpy(values)
        stored, weights = stored + size, weights + values.size
    if ends is not None:
        table = model.get_input_embeddings().weight
        table.data = torch.from_numpy(ends(table.detach().numpy())[0])
    return Made(TorchReference(model, int(model.config.vocab_size), has_adapter=False), 8 * stored / weights)


def _ggml(kind: str, weight: Float32) -> tuple[Float32, float]:
    """ggml's reference quantizer, from the gguf package."""
    from gguf import GGMLQuantizationType, quants

    type_ = GGMLQuantizationType[kind]
    packed = quants.quantize(weight, type_)
    return np.ascontiguousarray(quants.dequantize(packed, type_), np.float32), float(packed.nbytes)


def _hqq(group: int, weight: Float32) -> tuple[Float32, float]:
    """HQQ's own optimizer, with scales and zero points that it would keep in float16."""
    from hqq.core.quantize import Quantizer

    options = {"nbits": 4, "group_size": group, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    codes, facts = Quantizer.quantize(torch.from_numpy(weight.copy()), **options)
    values: Float32 = Quantizer.dequantize(codes, facts).numpy()
    return values, weight.size * (4 + 32 / group) / 8
