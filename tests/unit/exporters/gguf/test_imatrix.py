"""The importance matrix read back, by readers of our own and by llama.cpp's quantizer."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import vera_edge
from tests import tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.reference.input_squares import input_squares
from vera_edge.text import mixture, windows
from vera_edge.text.mixture import Mixture
from vera_edge_gguf import imatrix

Means = Mapping[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 8)
    return path


@pytest.fixture(scope="module")
def exported(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, text: Path) -> Mapping[str, Path]:
    """The model as f16, with a matrix in each format."""
    made = {}
    for form in ("gguf", "dat"):
        made[form] = vera_edge.export(
            tiny_llama.nf4,
            tiny_adapter,
            out=text.parent / form,
            target="gguf",
            weights="f16",
            imatrix=form,
            calibration=[f"{text}=1"],
        ).folder
    return made


def of_gguf(path: Path) -> Means:
    """As llama-quantize reads it: sums over counts."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
    assert len(tensors) == 2 * len(names)
    return {name: (tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]).reshape(-1) for name in names}


def of_dat(path: Path) -> Means:
    """As llama-quantize reads it: values over the calls."""
    data, at, found = path.read_bytes(), 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        found[name] = np.frombuffer(data, "<f4", count, at) / calls
        at += 4 * count
    chunks, length = struct.unpack_from("<ii", data, at)
    assert chunks > 1 and data[at + 8 :] == b"text.txt" and length == 8
    return found


def test_both_formats_hold_the_mean_squares_of_what_layers_read(
    exported: Mapping[str, Path], tiny_llama: tiny.TinyLlama, tiny_adapter: Path, text: Path, tmp_path: Path
) -> None:
    """Truth: transformers' own model of the merged weights, and what its layers are called with."""
    import torch
    from transformers import AutoModelForCausalLM

    vera_edge.merge(tiny_llama.nf4, tiny_adapter, out=tmp_path / "merged", to="fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    read: dict[str, list[Any]] = {"q_proj": [], "down_proj": []}
    for name, module in (
        ("q_proj", model.model.layers[1].self_attn.q_proj),
        ("down_proj", model.model.layers[0].mlp.down_proj),
    ):
        module.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0][0]))
    tokenizer = windows.open_tokenizer(tmp_path / "merged")
    cut = mixture.cut(Mixture.only(text), tokenizer, tiny.VOCABULARY, imatrix.TOKENS, windows.WINDOW)
    with torch.inference_mode():
        for window in cut.windows:
            model(torch.tensor(window[None]))
    found = of_gguf(exported["gguf"] / "imatrix.gguf")
    assert len(found) == 14 and "blk.1.ffn_down.weight" in found
    older = of_dat(exported["dat"] / "imatrix.dat")
    assert found.keys() == older.keys()
    for name in found:
        assert np.allclose(found[name], older[name], rtol=1e-5), name
    for name, tensor in (("q_proj", "blk.1.attn_q.weight"), ("down_proj", "blk.0.ffn_down.weight")):
        wanted = torch.cat(read[name]).square().mean(0).numpy()
        assert np.allclose(found[tensor], wanted, rtol=1e-4), tensor


def test_sums_are_exact_and_the_same_layer_by_layer(tiny_llama: tiny.TinyLlama) -> None:
    import torch

    checkpoint = Checkpoint.open(tiny_llama.fp32)
    windows = [np.arange(3, 23), np.arange(10, 41)]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    found = input_squares(checkpoint, names, windows)
    light = input_squares(checkpoint, names, windows, max_memory=1)
    model, read = tiny.load(tiny_llama.fp32).eval(), []
    model.get_submodule(names[1]).register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    with torch.inference_mode():
        for window in windows:
            model(torch.tensor(window[None]))
    wanted = torch.cat(read).double().square().sum(0).numpy()
    assert found[names[1]].count == 51 == light[names[1]].count
    assert np.allclose(found[names[1]].sums, wanted, rtol=1e-5)
    for name in names:
        assert np.allclose(found[name].sums, light[name].sums, rtol=1e-6)


def test_llama_cpps_quantizer_rounds_by_it(exported: Mapping[str, Path], tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp")
    plain = quantized(llama_cpp, exported["gguf"], tmp_path / "plain.gguf", {})
    found = of_gguf(exported["gguf"] / "imatrix.gguf")
    weighed = quantized(llama_cpp, exported["gguf"], tmp_path / "weighed.gguf", found)
    name = "blk.0.attn_q.weight"
    assert plain[name].tensor_type == weighed[name].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert not np.array_equal(plain[name].data, weighed[name].data)


def quantized(llama_cpp: Any, folder: Path, out: Path, means: Means) -> Mapping[str, Any]:
    """The tensors of the folder's model in Q4_0, by llama.cpp's quantizer with an importance matrix."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    held = [np.ascontiguousarray(values) for values in means.values()]
    for entry, name, values in zip(entries, means, held, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if means:
        options.imatrix = ctypes.cast(entries, type(options.imatrix))
    source = str(folder / "model.gguf").encode()
    assert not llama_cpp.llama_model_quantize(source, str(out).encode(), ctypes.byref(options))
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}


def test_another_format_is_refused(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path) -> None:
    common: Any = {"out": tmp_path / "out", "imatrix": "csv"}
    with pytest.raises(PlanError, match="written as gguf or dat, not 'csv'"):
        vera_edge.export(tiny_llama.nf4, tiny_adapter, target="gguf", **common)
    with pytest.raises(PlanError, match="imatrix"):
        vera_edge.export(tiny_llama.nf4, tiny_adapter, weights="fp32", **common)
    assert not (tmp_path / "out").exists()
