"""`vera_edge.golden`: the answers of the model as trained, put into a bundle to validate it by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.api.arguments import StrPath, folders, loading, size_or_none
from vera_edge.base.trained_as import TrainedAs
from vera_edge.bundle.manifest import Manifest
from vera_edge.exporting import golden_vectors
from vera_edge.progress import Progress, Tell, silent, unheard

__all__ = ["golden"]


def golden(
    bundle: StrPath,
    base: StrPath,
    adapters: StrPath | Sequence[StrPath],
    *,
    prompts: StrPath | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_cosine: float | None = None,
    max_relative_error: float | None = None,
    max_largest_error: float | None = None,
    min_rank_correlation: float | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    max_memory: int | str | None = None,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Manifest:
    """Ask the model as trained, and add its answers to a bundle, to validate it by on the device.

    Each adapter is asked at the weight that the bundle has it at.

    Args:
        bundle: the exported folder, not signed yet.
        base: the base's folder that it was exported from.
        adapters: of a branch bundle one or more of its adapters' PEFT folders, of a merged one all of them.
        prompts: a file with a prompt, or a text of an encoder, a line; None: built-in ones.
        max_kl, min_top1: limits to put into the bundle: mean KL in nats, top-1 agreement from 0 to 1.
        min_cosine: the same for embeddings: mean cosine with the reference's.
        max_relative_error, max_largest_error: for a reranker or a regression: the mean and the largest error,
            in standard deviations of the reference's values.
        min_rank_correlation: Spearman's, over the texts.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        max_memory: bytes, or words like "6GB": a model that takes more than half of them in float32, or of
            what is free, is run layer by layer.
        progress: called with what is done, how much of it, and of how much.
        tell: given sentences for a person, on how the projections were found.

    Returns:
        The bundle's new Manifest; `golden` names the file.

    Raises:
        MismatchError: the bundle was made of other inputs than these.
        OutputError: it is signed.
        PlanError: nothing can be held to a limit.

    Example:
        >>> manifest = vera_edge.golden("bundle", "base", "adapter", max_kl=0.1)
        >>> manifest.golden, manifest.limits["max_kl"]
        ('golden.json', 0.1)
    """
    asked = {
        "max_kl": max_kl,
        "min_top1": min_top1,
        "min_cosine": min_cosine,
        "max_relative_error": max_relative_error,
        "max_largest_error": max_largest_error,
        "min_rank_correlation": min_rank_correlation,
    }
    limits = {name: value for name, value in asked.items() if value is not None}
    lines = None if prompts is None else golden_vectors.read_prompts(Path(prompts))
    return golden_vectors.ask(
        Path(bundle),
        Path(base),
        [(path, None) for path in folders(adapters)],
        limits or None,
        lines,
        projection_rounding,
        progress,
        loading(trained_as),
        tell,
        size_or_none(max_memory),
    )
