"""PEFT folders of adapters that were made here, written layer by layer in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vera_edge.adapters.adapter import LORA
from vera_edge.adapters.folder import CONFIG_NAME
from vera_edge.adapters.peft_methods import IA3
from vera_edge.arrays import Float32
from vera_edge.combining.low_rank import LowRank, Nearest, check_finite
from vera_edge.combining.sources import Sources
from vera_edge.combining.written import WrittenAdapter
from vera_edge.errors import DriftExceeded
from vera_edge.merging.terms import quiet
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import staged_folder, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.storage.tensors import RawTensor, write_header

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that would take away some of the layers that are named in full.
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_KEPT = ("task_type", "base_model_name_or_path", "auto_mapping", "revision")


@dataclass
class Share:
    """The Frobenius norm of a part, by that of the whole, over all layers."""

    part: float = 0.0
    whole: float = 0.0

    def add(self, part: float, whole: float) -> float:
        """Take a layer's norms; gives its own share."""
        self.part, self.whole = math.hypot(self.part, part), math.hypot(self.whole, whole)
        return part / whole if whole else 0.0

    @property
    def value(self) -> float:
        """The share, 0 where there is nothing."""
        return self.part / self.whole if self.whole else 0.0


@dataclass(frozen=True, eq=False)
class Writing:
    """One folder to write. record: other JSON files to lay beside the config. progress: counts layers.

    max_error: the largest `error` at which anything is written.
    """

    out: Path
    force: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = silent
    max_error: float | None = None

    def lora(self, sources: Sources, rank: int, layer: Callable[[str], Nearest | LowRank]) -> WrittenAdapter:
        """Write a LoRA folder of one rank and scale 1. layer: gives a module's pair, of that rank or less.

        Raises DriftExceeded above `max_error`.
        """
        names, linears = sources.names, sources.checkpoint.linears
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for module in sources.modules:
            linear = linears[module]
            shapes[f"{_PREFIX}{names[module]}.lora_A.weight"] = ("F32", (rank, linear.in_features))
            shapes[f"{_PREFIX}{names[module]}.lora_B.weight"] = ("F32", (linear.out_features, rank))
        errors, share = dict[str, float](), Share()

        def values() -> Iterator[Float32]:
            for done, module in enumerate(sources.modules):
                self.progress("layers", done, len(sources.modules))
                with quiet():
                    found = layer(module)
                if isinstance(found, Nearest):
                    errors[module] = share.add(found.error, found.norm)
                pair = (found.product if isinstance(found, Nearest) else found).padded(rank)
                check_finite(pair.right, pair.left)
                yield from (pair.right, pair.left)
            self.progress("layers", len(sources.modules), len(sources.modules))
            if self.max_error is not None and share.value > self.max_error:
                raise DriftExceeded(
                    f"rank {rank} leaves {share.value:.2%} of the change, and at most {self.max_error:.2%} "
                    "was allowed; nothing was written: take a higher rank"
                )

        size = self._write(sources, shapes, values(), _lora_config(sources, rank))
        error = share.value if errors else None
        return WrittenAdapter(
            self.out, LORA, len(sources.modules), rank, size, error, errors, notes=sources.notes
        )

    def vectors(
        self,
        sources: Sources,
        pairs: Mapping[str, Mapping[str, Float32]],
        settings: Mapping[str, Any],
        saved: Mapping[str, Float32] | None = None,
    ) -> WrittenAdapter:
        """Write a folder of the first adapter's method. pairs: arrays by module and PEFT's end of a name;
        settings: of the config, beside the first adapter's; saved: what all layers share.
        """
        first, names = sources.each[0].adapter, sources.names
        arrays = {f"base_model.{name}": values for name, values in sorted((saved or {}).items())}
        for module, ends in pairs.items():
            arrays |= {f"{_PREFIX}{names[module]}.{end}": values for end, values in sorted(ends.items())}
        check_finite(*arrays.values())
        shapes = {name: ("F32", values.shape) for name, values in arrays.items()}
        config = {key: value for key, value in first.config.items() if key not in _CHOOSING}
        config |= {"target_modules": sorted(names.values()), "modules_to_save": _whole(sources)}
        config |= {"inference_mode": True, **settings}
        size = self._write(sources, shapes, iter(arrays.values()), config)
        return WrittenAdapter(self.out, first.method, len(pairs), first.rank, size, notes=sources.notes)

    def _write(
        self,
        sources: Sources,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        values: Iterator[Float32],
        config: Mapping[str, Any],
    ) -> int:
        """The folder, whole or not at all; gives the bytes of its weights. values: in the order of shapes."""
        tensors = [
            item
            for source in sources.each
            for item in (source.adapter.as_trained or source.adapter).modules_to_save.items()
        ]
        keeps = config["peft_type"] != IA3  # IA3 scales biases with the outputs, and has none of its own
        biases = sources.biases if keeps else {}
        tensors += [(name, RawTensor.of(bias)) for name, bias in sorted(biases.items())]
        whole = {f"{_PREFIX}{name}": (tensor.dtype, tensor.shape) for name, tensor in tensors}
        if keeps:
            config = {**config, "bias": "all" if biases else "none"}
        with staged_folder(self.out, self.force) as stage:
            with (stage / WEIGHTS).open("wb") as stream:
                write_header(stream, {**shapes, **whole}, {"format": "pt"})
                for array in values:
                    _put(stream, RawTensor.of(array))
                for _, tensor in tensors:
                    _put(stream, tensor)
            sources.files.copy(stage)
            for name, facts in self.record.items():
                write_atomic(stage / name, canonical_json(facts))
            write_atomic(stage / CONFIG_NAME, canonical_json(config))
            return (stage / WEIGHTS).stat().st_size


def _put(stream: BinaryIO, tensor: RawTensor) -> None:
    stream.write(tensor.data.data)


def _whole(sources: Sources) -> list[str] | None:
    """The `modules_to_save` of all."""
    named = [source.adapter.config.get("modules_to_save") or [] for source in sources.each]
    return sorted({str(name) for names in named for name in names}) or None


def _lora_config(sources: Sources, rank: int) -> dict[str, Any]:
    first = sources.each[0].adapter
    return {
        **{key: first.config.get(key) for key in _KEPT},
        "fan_in_fan_out": any(sources.checkpoint.is_conv1d(module) for module in sources.modules),
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": _whole(sources),
        "peft_type": LORA,
        "r": rank,
        # Full names: a short one could match layers that the adapters left alone.
        "target_modules": sorted(sources.names.values()),
    }
