"""`vera_edge.inspect`: what an adapter is, and whether it fits a base."""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath, check_base_given, loading, path_or_none
from vera_edge.base.trained_as import TrainedAs
from vera_edge.trained.inspection import Cost, Inspection, Kind, inspect_folder

__all__ = ["Cost", "Inspection", "Kind", "inspect"]


def inspect(
    adapter: StrPath,
    *,
    base: StrPath | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
) -> Inspection:
    """Say what an adapter is, whether it fits a base, and what it costs on the device.

    Args:
        adapter: the PEFT folder.
        base: the base's folder; without it nothing is said of whether it fits.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".

    Returns:
        An Inspection. `fits` is None without a base, False when `misfit` says why not; `cost` has bytes by
        format, and multiply-accumulates per token, and is None of what can only be merged, or becomes a LoRA.

    Raises:
        AdapterError, CheckpointError: a folder can't be read.
        PlanError: trained_as isn't known, or comes without a base.

    Example:
        >>> found = vera_edge.inspect("adapter", base="base")
        >>> found.rank, found.fits
        (8, True)
    """
    check_base_given(base, trained_as)
    return inspect_folder(Path(adapter), path_or_none(base), projection_rounding, loading(trained_as))
