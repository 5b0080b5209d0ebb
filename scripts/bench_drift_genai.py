"""ONNX Runtime GenAI's builder, and graphs of its kind run in plain ONNX Runtime, for the drift tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from scripts.bench_drift_rows import Made
from vera_edge.measuring.artefact import folder_bytes

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
GENAI = f"onnxruntime-genai {version('onnxruntime-genai')}"


def built(source: Path, folder: Path, algorithm: str, *options: str) -> Path:
    """`folder`, with the builder's int4 of `source`: blocks of 32, the head in int8, as ours."""
    options = (f"algo_config={algorithm}", "block_size=32", "accuracy_level=4", *options)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder]
    command += ["-p", "int4", "-e", "cpu", "-c", folder.parent / "cache", "--extra_options", *options]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return folder


def made(folder: Path) -> Made:
    """A folder of the builder's to measure."""
    return Made(Graph.open(folder), _bits(folder / "model.onnx"), folder_bytes(folder))


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
class Graph:
    """A decoder graph of the builder in plain ONNX Runtime, the cache empty."""

    session: ort.InferenceSession
    vocab_size: int
    cache: tuple[int, int]  # heads and their size

    @classmethod
    def open(cls, folder: Path) -> Graph:
        session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        model = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        cache = (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"])
        return cls(session, model["vocab_size"], cache)

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
