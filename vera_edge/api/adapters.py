"""`vera_edge.pack_adapter`, `freeze_adapter`, `to_lora`: adapters on their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.api.arguments import StrPath, loading, path_or_none

if TYPE_CHECKING:
    from vera_edge.base.trained_as import TrainedAs
    from vera_edge.exporting.frozen_graph import Frozen
    from vera_edge.exporting.onnx_adapter import Packed
    from vera_edge.trained.to_lora import LoraAdapter

__all__ = ["freeze_adapter", "pack_adapter", "to_lora"]


def pack_adapter(
    adapter: StrPath,
    bundle: StrPath,
    *,
    out: StrPath,
    weight: float = 1.0,
    force: bool = False,
) -> Packed:
    """Pack an adapter for a bundle that was exported as a branch (`vera-edge adapter pack --for BUNDLE`).

    In float32 or float16, as the bundle was exported.

    Args:
        adapter: the PEFT folder.
        bundle: the branch bundle that will run it.
        out: the .onnx_adapter to write.
        weight: scales the adapter's delta.
        force: replace `out` where it exists.

    Returns:
        A Packed: the file, its size in bytes and its SHA-256.

    Raises:
        MismatchError: rank, seed, projections, layers or shapes aren't the bundle's; ONNX Runtime would run
            such a file without a word.
        AdapterError, BundleError, OutputError: an input can't be read, `out` can't be written.

    Example:
        >>> packed = vera_edge.pack_adapter("adapter", "bundle", out="other.onnx_adapter", weight=0.5)
        >>> vera_edge.Session.open("bundle", packed.path).adapter.name
        'other.onnx_adapter'
    """
    from vera_edge.exporting.onnx_adapter import pack_folder

    return pack_folder(Path(adapter), Path(bundle), Path(out), weight, force)


def freeze_adapter(
    adapter: str | Path, bundle: StrPath, *, name: str | None = None, force: bool = False
) -> Frozen:
    """Add a graph to a branch bundle that has an adapter built in, for runtimes that swap no adapters.

    The weights are shared with the bundle's own graph. Freeze before signing.

    Args:
        adapter: a name of the bundle, or an .onnx_adapter file.
        bundle: the branch bundle to add the graph to.
        name: `model_NAME.onnx` is written; None: the adapter's name.
        force: replace a graph of that name.

    Returns:
        A Frozen: the graph's file and its size in bytes.

    Raises:
        MismatchError: the bundle has its adapter merged, or the adapter isn't for it.
        OutputError: the name is taken, or the bundle is signed.
        BundleError: the bundle is damaged.

    Example:
        >>> frozen = vera_edge.freeze_adapter("default", "bundle", name="alone")
        >>> frozen.path.name
        'model_alone.onnx'
    """
    from vera_edge.exporting.frozen_graph import freeze

    path = Path(adapter)
    file = isinstance(adapter, Path) or adapter.endswith(".onnx_adapter")
    chosen = path if file else adapter
    return freeze(Path(bundle), chosen, name or (path.stem if file else str(adapter)), force)


def to_lora(
    adapter: StrPath,
    *,
    out: StrPath,
    base: StrPath | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    force: bool = False,
) -> LoraAdapter:
    """Write an adapter as a LoRA adapter that computes exactly the same, for tools that know only LoRA.

    Args:
        adapter: the PEFT folder.
        out: the LoRA folder to write, whole or not at all.
        base: the base's folder, where the adapter's config doesn't lead to it.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        force: replace `out` where it exists.

    Returns:
        A LoraAdapter: the folder, its layers, its rank, and the bytes of its weights (float32).

    Raises:
        AdapterError: the adapter can't be carried over.
        MismatchError: it doesn't fit the base.
        OutputError: `out` exists or can't be written.

    Example:
        >>> made = vera_edge.to_lora("adapter", out="lora", base="base")
        >>> made.rank, made.layers
        (8, 14)
    """
    from vera_edge.trained import to_lora as lora

    asked = (path_or_none(base), projection_rounding, force, loading(trained_as))
    return lora.to_lora(Path(adapter), Path(out), *asked)
