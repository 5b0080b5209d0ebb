"""A float base as it was in training, though it was never saved so: quantized, or cast, as it was loaded.

    spec     how it was loaded, in words: "nf4,double"
    choice   which layers transformers has quantized, and the dtype of the rest (transformers is asked)
    config   its config.json
    folder   its tensors, made of the float ones when they're read, bit for bit as bitsandbytes makes them

Most people train on a model of a hub with `BitsAndBytesConfig(load_in_4bit=True)`, and no quantized folder
ever exists. The adapter's vectors were fitted to the quantized weights all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vera_edge import formats
from vera_edge.base.trained_as.choice import choose
from vera_edge.base.trained_as.config import loaded_config, loading_dtype
from vera_edge.base.trained_as.folder import LoadedFolder
from vera_edge.base.trained_as.spec import DTYPES, FLOAT, FOUR_BIT, QUANTIZED, TrainedAs, parse
from vera_edge.errors import CheckpointError, MismatchError, PlanError
from vera_edge.formats import StoredLinear, checks, gguf
from vera_edge.formats.bnb4 import STORAGES
from vera_edge.formats.dense import DTYPES as DENSE
from vera_edge.storage.tensors import TensorFolder

__all__ = ["LoadedFolder", "TrainedAs", "loaded", "parse", "quantized_as"]

Parts = tuple[TensorFolder, Mapping[str, Any], Mapping[str, StoredLinear]]


def loaded(
    path: Path,
    tensors: TensorFolder,
    config: Mapping[str, Any],
    linears: Mapping[str, StoredLinear],
    spec: TrainedAs,
) -> Parts:
    """Tensors, config.json and linears of the base in `path` as it is when it was loaded as `spec` says.

    Raises MismatchError when it's quantized and `spec` says otherwise, CheckpointError when it can't be
    loaded so.
    """
    before = quantized_as(config, linears)
    if before is not None:
        _check_same(path, before, spec)
        return tensors, config, linears
    if spec == TrainedAs(FLOAT):
        return tensors, config, linears
    if spec.quantized and gguf.is_gguf(path):
        raise CheckpointError(
            f"{path} is GGUF, which transformers doesn't quantize on loading, so nothing was trained on it "
            f"as {spec.format}; give the folder of floats that was loaded"
        )
    dtype = loading_dtype(spec, config, tensors)
    choice = choose(path, tensors, config, spec, dtype)
    if spec.quantized and not choice.quantized:
        raise CheckpointError(
            f"the transformers that is installed quantizes no layer of {path}, so it can't have been loaded "
            f"as {spec} by it; where another version did, save_pretrained there and give that folder"
        )
    folder = LoadedFolder(tensors, spec, choice)
    # The layers left in floats as a reader of the folder would find them, then those that are quantized.
    floats = formats.find_linears(folder.floats(), loaded_config(config, TrainedAs(FLOAT), dtype))
    return folder, loaded_config(config, spec, dtype), {**floats, **folder.linears()}


def quantized_as(config: Mapping[str, Any], linears: Mapping[str, StoredLinear]) -> TrainedAs | str | None:
    """How a quantized base is stored, by its format's name where no `TrainedAs` says it; None for floats."""
    stored = next((linear for linear in linears.values() if linear.format not in DENSE), None)
    if stored is None or stored.format not in QUANTIZED:
        return None if stored is None else stored.format
    told = checks.quantization(config)
    skip = tuple(map(str, told.get("llm_int8_skip_modules") or ()))
    try:
        if stored.format not in FOUR_BIT:
            dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
            return TrainedAs(stored.format, dtype if dtype in DTYPES else None, skip=skip)
        return TrainedAs(
            stored.format,
            stored.params["dtype"],
            stored.params["double_quant"],
            str(told.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
            STORAGES[stored.params["storage"]],
            skip,
        )
    except PlanError:  # its config says what no `TrainedAs` can
        return stored.format


def _check_same(path: Path, before: TrainedAs | str, spec: TrainedAs) -> None:
    """Raise MismatchError when a quantized base is another than `spec` says, as far as it says anything."""
    told = ["format", "double_quant", "compute_dtype", "storage"]
    told += [name for name in ("dtype", "skip") if getattr(spec, name)]
    if isinstance(before, str) or any(getattr(before, name) != getattr(spec, name) for name in told):
        raise MismatchError(
            f"{path} is quantized already, as {before}, and can't have been loaded as {spec}; leave "
            "--trained-as out, or give the float base"
        )
