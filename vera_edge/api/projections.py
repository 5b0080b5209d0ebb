"""`vera_edge.projections`: the shared A and B that an adapter was trained with."""

from __future__ import annotations

from pathlib import Path

from vera_edge.adapters import projection
from vera_edge.adapters import reading as adapters
from vera_edge.api.arguments import StrPath, check_base_given, loading, path_or_none
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import PlanError
from vera_edge.storage.files import check_output
from vera_edge.trained import model as trained_base
from vera_edge.trained import provenance
from vera_edge.trained.provenance import Provenance

__all__ = ["Provenance", "projections"]


def projections(
    adapter: StrPath,
    *,
    base: StrPath | None = None,
    verify: bool = False,
    out: StrPath | None = None,
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    force: bool = False,
) -> Provenance:
    """Regenerate the projections that an adapter was trained with, and say how they were found.

    Args:
        adapter: the PEFT folder.
        base: the base's folder; needed where the adapter's doesn't hold its projections.
        verify: raise MismatchError when the saved projections aren't what the seed gives.
        out: a safetensors file to write vera_A and vera_B to.
        projection_rounding: what they were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        force: replace `out` where it exists.

    Returns:
        A Provenance: `projections.a` (rank, in_max) and `projections.b` (out_max, rank), float32; `spec`,
        from which they come out bit for bit; `how`, a sentence.

    Raises:
        AdapterError: nothing tells what they were.
        MismatchError: adapter and base don't belong together.
        PlanError: the request contradicts itself.

    Example:
        >>> found = vera_edge.projections("adapter", base="base")
        >>> found.spec.rank, found.from_seed
        (8, True)
    """
    if verify and out is not None:
        raise PlanError("verify and out don't go together; leave one of them out")
    if out is not None:
        check_output(Path(out), force)
    check_base_given(base, trained_as)
    folder, checkpoint = path_or_none(base), None
    if folder is None:
        read = adapters.read(Path(adapter))
    else:
        pairs = [(Path(adapter), 1.0)]
        checkpoint, ((read, _),) = trained_base.read(folder, pairs, trained_as=loading(trained_as))
    resolve = provenance.verify if verify else provenance.resolve_for_command
    found = resolve(read, checkpoint, projection_rounding)
    if out is not None:
        projection.write(found.projections, Path(out))
    return found
