"""The exact bridge to every LoRA tool: a VeRA adapter written as a LoRA adapter, without an approximation.

`diag(b) B diag(d) A x = B' A' x` with `A' = diag(d) A[:, :in]` and `B' = diag(b) B[:out]`, so with
lora_alpha = r (a scale of 1) the LoRA adapter computes the same function. It is as large as a LoRA adapter of
that rank: what VeRA saves by sharing A and B is written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import LORA, Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import vectors_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import AdapterError
from vera_edge.storage.files import check_output, staged_folder, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.storage.tensors import RawTensor, write_header
from vera_edge.trained import alignment, provenance


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter that was written: its folder, layers, rank, bytes of weights, notes for a person."""

    folder: Path
    layers: int
    rank: int
    size: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"folder": str(self.folder), "layers": self.layers, "rank": self.rank, "size": self.size}


def to_lora(
    adapter_path: Path,
    out: Path,
    base: Path | None = None,
    projection_rounding: str | None = None,
    force: bool = False,
    trained_as: TrainedAs | None = None,
) -> LoraAdapter:
    """Write the VeRA adapter in `adapter_path` as a PEFT LoRA folder, in float32.

    base: the base model's folder; without it the base named in the adapter's config is looked for, as a path.
    trained_as: how the base was loaded in training.
    Raises AdapterError when the adapter can't be carried over, MismatchError when it doesn't fit the base.
    """
    trained = adapters.read(adapter_path)
    if not trained.is_vera:
        raise AdapterError(
            f"{adapter_path} is a {trained.method} adapter, and only VeRA's become LoRA here; merge it, "
            "or let PEFT convert it (peft.convert_to_lora)"
        )
    checkpoint = Checkpoint.open(base or _named_base(trained), trained_as)
    adapter = alignment.align(trained, checkpoint)
    # A LoRA tool looks for layers where PEFT's model has them; their sizes are the checkpoint's.
    names = dict(zip(adapter.vectors, trained.vectors, strict=True))
    check_output(out, force, (adapter_path, checkpoint.path))
    found = provenance.resolve_for_command(adapter, checkpoint, projection_rounding)
    if adapter.biases:
        raise AdapterError(
            f"{adapter_path} trained biases, which a LoRA folder of PEFT can't carry; merge it"
        )
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in sorted(adapter.vectors):
        linear = checkpoint.linear(module)
        shapes[_key(names[module], "A")] = ("F32", (adapter.rank, linear.in_features))
        shapes[_key(names[module], "B")] = ("F32", (linear.out_features, adapter.rank))
    for name, tensor in sorted(trained.modules_to_save.items()):
        shapes[f"base_model.model.{name}"] = (tensor.dtype, tensor.shape)
    with staged_folder(out, force) as stage:
        with (stage / "adapter_model.safetensors").open("wb") as stream:
            write_header(stream, shapes, {"format": "pt"})
            for module in sorted(adapter.vectors):
                for factor in _factors(adapter, module, found.projections, checkpoint):
                    stream.write(RawTensor.of(factor).data.data)
            for _, tensor in sorted(trained.modules_to_save.items()):
                stream.write(tensor.data.data)
        write_atomic(stage / "adapter_config.json", canonical_json(_config(adapter, checkpoint, names)))
        size = (stage / "adapter_model.safetensors").stat().st_size
    return LoraAdapter(out, len(adapter.vectors), adapter.rank, size, found.notes)


def _named_base(adapter: Adapter) -> Path:
    path = Path(adapter.base_name or "")
    if adapter.base_name is None or not path.is_dir():
        raise AdapterError(
            f"{adapter.path} names the base {adapter.base_name!r}, which isn't a folder here; give --base"
        )
    return path


def _key(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"


def _factors(adapter: Adapter, module: str, projections: Projections, checkpoint: Checkpoint) -> Any:
    pair, linear = vectors_of(adapter)[module], checkpoint.linear(module)
    yield pair.lambda_d[:, None] * projections.a[:, : linear.in_features]
    yield pair.lambda_b[:, None] * projections.b[: linear.out_features]


def _config(adapter: Adapter, checkpoint: Checkpoint, names: Mapping[str, str]) -> Mapping[str, Any]:
    kept = ("task_type", "modules_to_save", "base_model_name_or_path", "auto_mapping", "revision")
    conv1d = any(checkpoint.is_conv1d(module) for module in adapter.vectors)
    return {
        **{key: adapter.config.get(key) for key in kept},
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "peft_type": LORA,
        "r": adapter.rank,
        # Full names: a short one could match layers that the VeRA adapter left alone.
        "target_modules": sorted(names.values()),
    }
