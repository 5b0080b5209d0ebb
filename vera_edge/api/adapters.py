"""`vera_edge.pack_adapter`, `freeze_adapter`, `to_lora`, `combine_adapters`: adapters on their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.api.arguments import Adapters, StrPath, loading, path_or_none, weighted
from vera_edge.combining.written import WrittenAdapter
from vera_edge.progress import Progress, silent

if TYPE_CHECKING:
    from vera_edge.base.trained_as import TrainedAs
    from vera_edge.exporting.frozen_graph import Frozen
    from vera_edge.exporting.onnx_adapter import Packed

__all__ = ["WrittenAdapter", "combine_adapters", "freeze_adapter", "pack_adapter", "to_lora"]


def pack_adapter(
    adapter: StrPath,
    bundle: StrPath,
    *,
    out: StrPath,
    weight: float = 1.0,
    base: StrPath | None = None,
    trained_as: str | TrainedAs | None = None,
    force: bool = False,
) -> Packed:
    """Pack an adapter for a bundle that was exported as a branch (`vera-edge adapter pack --for BUNDLE`).

    In float32 or float16, as the bundle was exported. For a GGUF bundle it is a GGUF LoRA.

    Args:
        adapter: the PEFT folder, or a LoRA that Microsoft Olive wrote as an .onnx_adapter.
        bundle: the branch bundle that will run it.
        out: the .onnx_adapter to write, or .gguf for llama.cpp.
        weight: scales the adapter's delta.
        base: the base's folder, which DoRA and IA3 depend on, and GGUF bundles; else it isn't needed.
        trained_as: how that base was loaded in training when it was never saved so, like "nf4,double".
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

    read = (path_or_none(base), loading(trained_as))
    return pack_folder(Path(adapter), Path(bundle), Path(out), weight, force, *read)


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
    rank: int | None = None,
    max_error: float | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> WrittenAdapter:
    """Write an adapter of any method as a LoRA adapter, for tools that know only LoRA.

    Exact where what the method adds is of low rank, as VeRA's is; else the best approximation of a rank.

    Args:
        adapter: the PEFT folder.
        out: the LoRA folder to write, whole or not at all.
        base: the base's folder, where the adapter's config doesn't lead to it.
        rank: of the LoRA; None: the adapter's own, which must be all that it needs.
        max_error: the largest `error` at which anything is written.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        force: replace `out` where it exists.
        progress: called with how many layers are done.

    Returns:
        A WrittenAdapter: the folder, its layers, its rank, the bytes of its weights (float32); `error`, the
        share of the change (Frobenius norm) that the rank had no room for, in all, and `layer_errors`.

    Raises:
        AdapterError: the adapter can't be carried over, or needs a rank.
        MismatchError: it doesn't fit the base.
        DriftExceeded: the error is above `max_error`.
        OutputError: `out` exists or can't be written.

    Example:
        >>> made = vera_edge.to_lora("adapter", out="lora", base="base")
        >>> made.rank, made.layers, made.error
        (8, 14, None)
    """
    from vera_edge.combining import to_lora as lora

    asked = (path_or_none(base), projection_rounding, force, loading(trained_as), rank, max_error, progress)
    return lora.to_lora(Path(adapter), Path(out), *asked)


def combine_adapters(
    adapters: Adapters,
    *,
    out: StrPath,
    base: StrPath,
    combination: str = "cat",
    density: float | None = None,
    majority_sign: str | None = None,
    rank: int | None = None,
    seed: int | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> WrittenAdapter:
    """Combine adapters of one base into one adapter, as PEFT's `add_weighted_adapter` does for LoRA.

    Args:
        adapters: PEFT folders, each with its weight, of one method or of several.
        out: the PEFT folder to write, whole or not at all.
        base: the base's folder.
        combination: "cat", the sum itself; "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune" of
            factors; "svd" and those with "_svd" of dense deltas, cut to a rank.
        density: the share of values that TIES, DARE and magnitude pruning keep.
        majority_sign: of TIES: "total", the sum's (as None), or "frequency", that of most adapters.
        rank: what an SVD cuts to; None: the largest of the adapters'.
        seed: of DARE's draws; None: 0.
        projection_rounding: what VeRA's projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        force: replace `out` where it exists.
        progress: called with how many layers are done.

    Returns:
        A WrittenAdapter: LoRA, or VeRA where vectors were combined; `from_sum` says how far it is from the
        weighted sum of the deltas, `error` what an SVD left out.

    Raises:
        PlanError: an option that isn't known, is missing, or has no effect.
        AdapterError, CheckpointError: a folder can't be read.
        MismatchError: the adapters don't fit the base or each other.
        OutputError: `out` exists or can't be written.

    Example:
        >>> pairs = [("adapter", 0.7), ("adapter", -0.2)]
        >>> made = vera_edge.combine_adapters(pairs, out="mixed", base="base", combination="linear")
        >>> made.method, made.rank
        ('VERA', 8)
    """
    from vera_edge.combining.combination import Combination
    from vera_edge.combining.combine import combine

    asked = Combination(combination, density, majority_sign, rank, seed)
    given = (projection_rounding, loading(trained_as), force, progress)
    return combine(Path(base), weighted(adapters), Path(out), asked, *given)
