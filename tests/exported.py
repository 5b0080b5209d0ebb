"""Runs exported folders in plain ONNX Runtime, and the same model in PEFT: what tests of exports compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.session import Session
from vera_edge.measuring.exported_parts import PartedExport

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

    running, options = session(folder), onnxruntime.RunOptions()
    if adapter is not None:
        vectors = onnxruntime.LoraAdapter()
        vectors.Load(str(adapter))
        options.add_active_adapter(vectors)
    found: Float32 = running.run(["logits"], decoder_feeds(running, ids), options)[0][0]
    return found


def assert_same_logits(whole: Path, shipped: Path, installed: Path) -> None:
    """Hold a bundle that leaves files to be generated, and what was installed of it, to one that has them."""
    ids, vectors = tokens(), Path("adapters") / "default.onnx_adapter"
    truth = logits(whole, ids, whole / vectors)
    np.testing.assert_array_equal(logits(installed, ids, installed / vectors), truth)
    expected = Session.open(whole, threads=1).logits(ids)
    for folder in (shipped, installed):  # in memory, and from the file
        np.testing.assert_array_equal(Session.open(folder, threads=1).logits(ids), expected)
        assert_same_in_parts(folder, ids)


def assert_same_in_parts(folder: Path, *texts: Int64) -> PartedExport:
    """Hold an export that is run in as many parts as it can be to the same in one graph, to the bit."""
    parts = PartedExport.open(folder, most=1)
    assert len(parts.parts) == 2 + len(parts.facts.caches) // 2  # embeddings, layers, the head
    whole = Session.open(folder, four_bit="kept")
    for text, found in zip(texts, parts.logits_of(texts), strict=True):
        np.testing.assert_array_equal(found, whole.logits(text))
        assert_last_logits(whole, text)
    return parts


def assert_last_logits(session: Session, text: Int64) -> None:
    """Hold the logits behind a text that is fed for them alone to those of all of its tokens."""
    assert session.decoder.cuts_logits
    expected = session.logits(text)[-1]
    steps = Steps(session.decoder, session.decoder.cache(len(text)), session.vectors)
    found = steps.feed(text[None], last=True)
    assert found.shape == (1, 1, len(expected))
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6 * np.abs(expected).max())


def decoder_feeds(running: Any, ids: Int64) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a decoder's session for one sequence (n,), or for rows of them, with an empty cache."""
    rows = ids if ids.ndim == 2 else ids[None]
    feeds: dict[str, npt.NDArray[Any]] = {}
    for value in running.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = rows
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(rows.shape, np.int64)
        else:
            feeds[value.name] = np.zeros((len(rows), value.shape[1], 0, value.shape[3]), np.float32)
    return feeds


def batch_logits(folder: Path, ids: Int64, adapters: Sequence[Path]) -> Float32:
    """Logits (rows, n, vocabulary) of several sequences at once, each with its own `.onnx_adapter`."""
    import onnxruntime

    running = session(folder)
    files = [onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters() for path in adapters]
    vectors = {name: np.concatenate([file[name].numpy() for file in files]) for name in files[0]}
    found: Float32 = running.run(["logits"], decoder_feeds(running, ids) | vectors)[0]
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


def check(folder: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> int:
    """Run ONNX's checker with strict shape inference; then run the graph and hold every declared shape to it.

    onnx knows no SimplifiedLayerNormalization, which ONNX Runtime keeps in ONNX's own domain: its schema is
    registered first. Of contrib operators it knows nothing, hence the run. Returns the number of values held.
    """
    import onnx
    import onnxruntime

    _register_layer_norm()
    path = folder / "onnx" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    inner = list(model.graph.value_info)
    model.graph.output.extend(inner)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    running = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    symbols: dict[str, int] = {}
    arrays = running.run([value.name for value in inner], dict(feeds))
    for value, array in zip(inner, arrays, strict=True):
        shape = value.type.tensor_type.shape.dim
        assert len(shape) == array.ndim, value.name
        for dimension, size in zip(shape, array.shape, strict=True):
            if dimension.dim_param:
                assert symbols.setdefault(dimension.dim_param, size) == size, (value.name, array.shape)
            elif dimension.HasField("dim_value"):
                assert dimension.dim_value == size, (value.name, array.shape)
    return len(inner)


def _register_layer_norm() -> None:
    from onnx import defs

    name = "SimplifiedLayerNormalization"
    if defs.has(name):
        return
    schema, text = defs.OpSchema, "X over its root mean square, times scale"
    kinds = schema.AttrType
    attributes = {"axis": kinds.INT, "epsilon": kinds.FLOAT, "stash_type": kinds.INT}
    made = schema(
        name,
        "",
        1,
        text,
        inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("scale", "T")],
        outputs=[schema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[schema.Attribute(key, kind, "", required=False) for key, kind in attributes.items()],
    )

    def infer(context: Any) -> None:
        context.set_output_type(0, context.get_input_type(0))

    made.set_type_and_shape_inference_function(infer)
    defs.register_schema(made)


def files(folder: Path) -> dict[str, bytes]:
    """What all files of a folder hold, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
