"""Weight formats: how a linear's weight is stored, one module for each, and the registry that finds them.

Another distribution adds a format of its own with an entry point in the group "vera_edge.formats": its name
is the format's, its object a `WeightFormat` (of several, where a method has several names).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from vera_edge.errors import CheckpointError, FormatError
from vera_edge.formats import checks
from vera_edge.formats.bnb4 import Bnb4, Bnb4Weight
from vera_edge.formats.bnb8 import Int8, Int8Weight
from vera_edge.formats.dense import Dense
from vera_edge.formats.weight import (
    Layout,
    Rounder,
    StoredLinear,
    Weight,
    WeightFormat,
    add_rows,
    dequantize,
    round_sum,
    rounder,
    row_chunks,
)
from vera_edge.storage.tensors import TensorFolder

__all__ = [
    "FORMATS",
    "Bnb4Weight",
    "Int8Weight",
    "Layout",
    "Rounder",
    "StoredLinear",
    "Weight",
    "WeightFormat",
    "add_rows",
    "block_option",
    "dequantize",
    "find_linears",
    "get",
    "load",
    "notes",
    "round_sum",
    "rounder",
    "rounds_weights",
    "row_chunks",
]

# name -> "module:class", and what the class is given beside its name; imported when first asked for
_BUILT_IN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gptq": ("gptq:Gptq", {"bits": 4}),
    "gptq8": ("gptq:Gptq", {"bits": 8}),
    "awq": ("awq:Awq", {}),
    "compressed-tensors": ("compressed_tensors:CompressedTensors", {}),
    "w4a16": ("compressed_tensors:CompressedTensors", {"preset": "W4A16"}),
    "w8a16": ("compressed_tensors:CompressedTensors", {"preset": "W8A16"}),
    "w8a8": ("compressed_tensors:CompressedTensors", {"preset": "W8A8"}),
    "fp8-dynamic": ("compressed_tensors:CompressedTensors", {"preset": "FP8_DYNAMIC"}),
    "fp8": ("fp8:Fp8", {}),
    "hqq": ("hqq:Hqq", {}),
    "torchao": ("torchao:Torchao", {}),
}
# A tensor of such a name is never a plain one: if no format took it, config.json doesn't tell of it.
_TELLTALE = (".qweight", ".weight_packed", ".W_q", "._weight_qdata", ".weight_scale_inv", ".SCB")


class _Registry(Mapping[str, WeightFormat]):
    """The formats by name; the less common ones, and other distributions', are imported when asked for."""

    def __init__(self, formats: Mapping[str, WeightFormat]) -> None:
        self._ready = dict(formats)

    @cached_property
    def _entries(self) -> Mapping[str, Any]:
        return {entry.name: entry for entry in entry_points(group="vera_edge.formats")}

    def __getitem__(self, name: str) -> WeightFormat:
        if name not in self._ready:
            self._ready[name] = self._make(name)
        return self._ready[name]

    def _make(self, name: str) -> WeightFormat:
        if name in _BUILT_IN:
            (module, _, cls), facts = _BUILT_IN[name][0].partition(":"), _BUILT_IN[name][1]
            made: WeightFormat = getattr(import_module(f"{__name__}.{module}"), cls)(name, **facts)
            return made
        entry = self._entries[name]
        try:
            found: WeightFormat = entry.load()
        except Exception as cause:
            owner = entry.dist.name if entry.dist else entry.value
            raise FormatError(
                f"the weight format {name!r} of {owner} can't be loaded ({cause}); reinstall or remove it"
            ) from cause
        return found

    def __iter__(self) -> Iterator[str]:
        names = [*self._ready, *_BUILT_IN, *sorted(self._entries)]
        return iter(dict.fromkeys(names))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._ready or name in _BUILT_IN or name in self._entries


FORMATS: Mapping[str, WeightFormat] = _Registry(
    {
        "fp32": Dense("fp32"),
        "fp16": Dense("fp16"),
        "bf16": Dense("bf16"),
        "nf4": Bnb4("nf4"),
        "fp4": Bnb4("fp4"),
        "int8": Int8(),
    }
)


def get(name: str) -> WeightFormat:
    """The format called `name`; raises FormatError when there is none."""
    if name not in FORMATS:
        raise FormatError(f"no weight format is called {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def block_option(name: str) -> str:
    """The option by which a format takes how many weights share one scale."""
    return getattr(FORMATS.get(name), "block_key", "blocksize")


def find_linears(tensors: TensorFolder, config: Mapping[str, Any]) -> dict[str, StoredLinear]:
    """Every linear of a checkpoint, by module name, in file order.

    Raises FormatError when config.json names a quantization that no format reads, CheckpointError when
    config and tensors contradict each other.
    """
    method = checks.method(config)
    formats = list(FORMATS.values())
    methods = {"bitsandbytes", *(getattr(each, "quant_method", None) for each in formats)} - {None}
    if method is not None and method not in methods:
        raise FormatError(
            f"config.json says the weights are quantized by {method!r}, which vera-edge doesn't read; "
            f"it reads {', '.join(sorted(filter(None, methods)))}"
        )
    found: dict[str, StoredLinear] = {}
    for weight_format in formats:
        for module, linear in weight_format.find(tensors, config).items():
            if module in found:
                raise CheckpointError(
                    f"{module} is stored both as {found[module].format} and {linear.format}"
                )
            if 0 in linear.shape:
                raise CheckpointError(
                    f"the weight of {module} is empty (shape {list(linear.shape)}); if the model was trained "
                    "in parts (DeepSpeed ZeRO-3, FSDP), gather them when it is saved"
                )
            found[module] = linear
    _check_none_left(tensors, found, method)
    return found


def notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences on what a quantized model does beside storing its weights so, which isn't reproduced."""
    return tuple(note for each in _of_method(config) for note in getattr(each, "notes", lambda _: ())(config))


def rounds_weights(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that weights are quantized, and not activations or the KV cache alone."""
    known = _of_method(config)
    says = [getattr(each, "rounds_weights", lambda _: True)(config) for each in known]
    return checks.method(config) is not None and (not known or any(says))


def _of_method(config: Mapping[str, Any]) -> list[WeightFormat]:
    """The format that reads what config.json names, if it is one by its method's name."""
    method = checks.method(config)
    return [FORMATS[method]] if method is not None and method in FORMATS else []


def _check_none_left(tensors: TensorFolder, found: Mapping[str, StoredLinear], method: str | None) -> None:
    taken = {name for linear in found.values() for name in linear.tensors.values()}
    for name in tensors:
        if name.endswith(_TELLTALE) and name not in taken:
            says = f"its method is {method}" if method else "the model isn't quantized"
            raise CheckpointError(
                f"{name} in {tensors[name].file} belongs to a quantized weight, but config.json says {says}; "
                "one of the two is another model's"
            )


def load(tensors: TensorFolder, linear: StoredLinear) -> Weight:
    """One linear's weight in memory."""
    return get(linear.format).load(tensors, linear)
