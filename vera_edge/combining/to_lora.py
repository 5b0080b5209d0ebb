"""The bridge to every LoRA tool: an adapter of any method written as a LoRA adapter.

What a method adds as a product of two thin matrices is written out without an approximation: VeRA's
`diag(b) B diag(d) A x = B' A' x` with `A' = diag(d) A[:, :in]` and `B' = diag(b) B[:out]`. Of any other
method it is the best approximation of the asked rank to the change of each weight, with its error.
"""

from __future__ import annotations

import math
from pathlib import Path

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.base.trained_as import TrainedAs
from vera_edge.combining.folder import Writing
from vera_edge.combining.low_rank import LowRank, Nearest, nearest_to, nearest_to_product
from vera_edge.combining.sources import DeltaSource, open_sources
from vera_edge.combining.written import WrittenAdapter
from vera_edge.errors import AdapterError, PlanError
from vera_edge.progress import Progress, silent
from vera_edge.storage.files import check_output

# What float32's rounding in a merge by PEFT leaves of a product that is one, and more.
_ROUNDING = 1e-4


def to_lora(
    adapter_path: Path,
    out: Path,
    base: Path | None = None,
    projection_rounding: str | None = None,
    force: bool = False,
    trained_as: TrainedAs | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    progress: Progress = silent,
) -> WrittenAdapter:
    """Write the adapter in `adapter_path` as a PEFT LoRA folder, in float32.

    base: the base model's folder; without it the base named in the adapter's config is looked for, as a path.
    trained_as: how the base was loaded in training. rank: of the LoRA; None for the adapter's own, which must
    then be all that it needs. max_error: see `Writing`.
    Raises AdapterError when the adapter can't be carried over, MismatchError when it doesn't fit the base,
    DriftExceeded when it loses more than `max_error`.
    """
    if rank is not None and rank < 1:
        raise PlanError(f"the rank is {rank}; it must be at least 1")
    if max_error is not None and not (max_error >= 0 and math.isfinite(max_error)):
        raise PlanError(f"the largest error is {max_error}; give a share of the change, like 0.05")
    adapter = adapters.read(adapter_path)
    base = base or _named_base(adapter)
    check_output(out, force, (adapter_path, base))
    sources = open_sources(base, [(adapter_path, 1.0)], projection_rounding, trained_as)
    (source,) = sources.each
    if rank is None and not adapter.rank:
        raise AdapterError(
            f"{adapter_path} is an adapter of {adapters.title_of(adapter)}, which has no rank; give "
            "--rank, for the best approximation of that rank and its error"
        )

    def layer(module: str) -> Nearest | LowRank:
        product = source.product(module, sources.checkpoint.linear(module).in_features)
        if rank is None and product is not None:
            return _written_out(product, adapter)
        if product is not None:
            return nearest_to_product(product, rank or adapter.rank)
        found = nearest_to(source.delta(module, sources.checkpoint), rank or adapter.rank)
        if rank is None and found.error > _ROUNDING * found.norm:
            raise _not_low_rank(source, module, found)
        return found

    writing = Writing(out, force, progress=progress, max_error=max_error)
    return writing.lora(sources, rank or adapter.rank, layer)


def _written_out(product: LowRank, adapter: Adapter) -> LowRank:
    if not adapter.is_vera:
        raise AdapterError(
            f"{adapter.path} is a LoRA adapter already; give --rank to cut it to a lower rank, or "
            "`vera-edge adapter combine` to sum it with others"
        )
    return product


def _not_low_rank(source: DeltaSource, module: str, found: Nearest) -> AdapterError:
    adapter = source.adapter
    return AdapterError(
        f"what {adapter.path} ({adapters.title_of(adapter)}) changes of {module} isn't of rank "
        f"{adapter.rank}, which would lose {found.error / found.norm:.1%} of it; give --rank, for the best "
        "approximation of that rank and its error"
    )


def _named_base(adapter: Adapter) -> Path:
    path = Path(adapter.base_name or "")
    if adapter.base_name is None or not path.is_dir():
        raise AdapterError(
            f"{adapter.path} names the base {adapter.base_name!r}, which isn't a folder here; give --base"
        )
    return path
