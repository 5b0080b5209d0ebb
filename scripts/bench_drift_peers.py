"""Other tools' quantizers on the same merged weights, as rows of the drift tables.

ONNX Runtime GenAI's builder writes a graph that runs as it is. Of HQQ and llama.cpp the weights are measured
alone, dequantized and run in torch: what their kernels add isn't in these rows. Both need packages that
vera-edge doesn't (hqq, llama-cpp-python); a peer whose package isn't there is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from scripts.bench_drift_genai import GENAI, built, made
from scripts.bench_drift_rows import Made, Way
from scripts.prepare_demo import Demo
from vera_edge import merging as merge
from vera_edge.precision.trained import trained_model
from vera_edge.reference.model import TorchReference

Float32 = npt.NDArray[np.float32]
# Of a weight (out, in): what a quantizer makes of it, and how many bytes it stores.
Rounded = Callable[[Float32], tuple[Float32, float]]
ALGORITHMS = {"rtn": "rtn_last", "k_quant": "k_quant_last", "k_quant_mixed": "k_quant_mixed"}


def peers(demo: Demo, out: Path) -> Iterator[Way]:
    """Every peer whose packages are there."""
    yield from builders(demo, out, ALGORITHMS)
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


def builders(demo: Demo, out: Path, names: Iterable[str]) -> Iterator[Way]:
    """GenAI's builder on the merged model, by each of ALGORITHMS that is named."""
    for name in names:
        make = partial(_builder, demo, out, ALGORITHMS[name])
        yield Way(f"ONNX Runtime GenAI builder, int4 {name}", make, GENAI)


def _builder(demo: Demo, out: Path, algorithm: str) -> Made:
    """GenAI's builder's own int4 of the merged float model."""
    merged = out / "merged-fp32"
    if not merged.is_dir():
        ready = merge.prepare(demo.base, [(demo.adapter, 1.0)], "fp32")
        merge.perform(ready, merged)
    return made(built(merged, out / f"builder-{algorithm}", algorithm))


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
