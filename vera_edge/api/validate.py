"""`vera_edge.validate`: does a bundle do on this device what it was released to do?"""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath, size_or_none
from vera_edge.api.trust import check_signature, trust_in
from vera_edge.device.check.validate import Validation
from vera_edge.device.check.validate import validate as run
from vera_edge.progress import Progress, Tell, silent, unheard

__all__ = ["Validation", "validate"]


def validate(
    bundle: StrPath,
    *,
    max_memory: int | str | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    min_cosine: float | None = None,
    max_relative_error: float | None = None,
    max_largest_error: float | None = None,
    min_rank_correlation: float | None = None,
    threads: int | None = None,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Validation:
    """Run a bundle's golden vectors on this device and hold them to its limits.

    Args:
        bundle: the folder of the bundle, with golden vectors (`golden` puts them there).
        max_memory: bytes that this process may have held at its peak, or words like "400MB".
        max_kl, min_top1: replace the bundle's limits on the mean KL divergence (nats) and on top-1 agreement.
        min_cosine, max_relative_error, max_largest_error, min_rank_correlation: those of encoders.
        threads: threads per operator; None: all cores.
        trusted_keys, trusted_identity, require_signature, allow_unsigned: as in `verify`.
        progress: called with what is done, how much of it, and of how much.
        tell: given a sentence: who signed it.

    Returns:
        A Validation: every check, `passed`, the drift by adapter (KL in nats, shares from 0 to 1), the peak
        of memory in bytes, and what the device is. A check that fails isn't an error: see `passed`.

    Raises:
        BundleError: the bundle is damaged, or carries no golden vectors.
        PlanError: nothing can keep a limit.

    Example:
        >>> result = vera_edge.validate("bundle", max_kl=0.01)
        >>> result.passed, result.drift[0].same_top1
        (True, 1.0)
    """
    memory = size_or_none(max_memory)
    check_signature(
        Path(bundle), trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned), tell
    )
    limits = {
        "max_kl": max_kl,
        "min_top1": min_top1,
        "min_cosine": min_cosine,
        "max_relative_error": max_relative_error,
        "max_largest_error": max_largest_error,
        "min_rank_correlation": min_rank_correlation,
    }
    return run(Path(bundle), threads, memory, limits, progress)
