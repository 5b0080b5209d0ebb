"""Runs exported folders in plain ONNX Runtime, and the same model in PEFT: what tests of exports compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


def tokens(count: int = 48, vocabulary: int = 384, seed: int = 0) -> Int64:
    """Seeded token ids that avoid the special ones."""
    return np.random.default_rng(seed).integers(3, vocabulary, count)


def session(folder: Path) -> Any:
    """An ONNX Runtime session of the graph in `folder`."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(folder / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def logits(folder: Path, ids: Int64, adapter: Path | None = None) -> Float32:
    """Logits (n, vocabulary) of one sequence, with the vectors of an `.onnx_adapter` or without."""
    import onnxruntime

    running = session(folder)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for value in running.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = ids[None]
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, ids.size), np.int64)
        else:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    options = onnxruntime.RunOptions()
    if adapter is not None:
        vectors = onnxruntime.LoraAdapter()
        vectors.Load(str(adapter))
        options.add_active_adapter(vectors)
    found: Float32 = running.run(["logits"], feeds, options)[0][0]
    return found


def peft_logits(base: Path, adapter: Path, ids: Int64, active: bool = True) -> Float32:
    """The same from PEFT's own layers on a float base, unmerged, with nothing of ours in between."""
    import torch
    from peft import PeftModel

    from tests import tiny

    model = PeftModel.from_pretrained(tiny.load(base), adapter).eval()
    with torch.no_grad():
        if active:
            found = model(torch.from_numpy(ids[None])).logits
        else:
            with model.disable_adapter():
                found = model(torch.from_numpy(ids[None])).logits
    result: Float32 = found[0].numpy()
    return result


def error(found: Float32, truth: Float32) -> float:
    """The largest difference, relative to the scale of the truth."""
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def divergence(truth: Float32, found: Float32) -> float:
    """Mean Kullback-Leibler divergence in nats of the next-token distributions, truth to found."""
    p, q = (_log_softmax(values) for values in (truth, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(values: Float32) -> npt.NDArray[np.float64]:
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def ranges(folder: Path) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Offset, length and shape of every initializer that lies in the data file."""
    import onnx

    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "model.onnx_data"
            found[tensor.name] = (int(entries["offset"]), int(entries["length"]), tuple(tensor.dims))
    return found


def data(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """The bytes of an initializer."""
    offset, length, _ = ranges(folder)[name]
    with (folder / "onnx" / "model.onnx_data").open("rb") as stream:
        stream.seek(offset)
        return np.frombuffer(stream.read(length), np.uint8)
