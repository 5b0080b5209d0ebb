"""`vera_edge.bench`: how fast is a bundle on this device, and how much memory does it take?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vera_edge.api.arguments import StrPath, path_or_none
from vera_edge.api.trust import check_signature, trust_in
from vera_edge.device.check.bench import Bench, Spread
from vera_edge.device.check.bench import bench as measure
from vera_edge.progress import Progress, Tell, silent, unheard

__all__ = ["Bench", "Spread", "bench"]


def bench(
    bundle: StrPath,
    *,
    against: StrPath | None = None,
    threads: Sequence[int] = (),
    rounds: int = 5,
    prompt: int = 128,
    new: int = 64,
    products: Sequence[str] = (),
    resident: bool = False,
    huge_pages: bool = False,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> Bench:
    """Measure a bundle on this device: load, first token, prefill, decode, memory, energy where it is told.

    Args:
        bundle: the bundle's folder.
        against: another bundle, measured in turn with it and compared.
        threads: thread counts to try, one after the other; none given: all cores.
        rounds: repetitions, each in a process of its own.
        prompt: tokens to feed.
        new: tokens to generate, 2 or more.
        products: formats to time the layers' products in, one token each, like "int4" or "int8:128", for
            `plan(device_times=)`.
        resident, huge_pages: open the bundle so, as `open_bundle` does; the other bundle runs without.
        trusted_keys, trusted_identity, require_signature, allow_unsigned: as in `verify`.
        progress: called with what is done, how much of it, and of how much (rounds).
        tell: given a sentence: who signed it.

    Returns:
        A Bench: `measured`, a row for each bundle and number of threads, with figures as percentiles 10, 50
        and 90 (seconds, tokens a second, bytes, joules a token), and `ratios` with 95 % intervals.

    Raises:
        BundleError: a bundle can't be opened, or its adapter is merged and can't be resident.
        DataError: the numbers make no sense or don't fit its context.

    Example:
        >>> result = vera_edge.bench("bundle", rounds=1, prompt=8, new=4)
        >>> result.measured[0].figures["decode"].median > 0
        True
    """
    check_signature(
        Path(bundle), trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned), tell
    )
    return measure(
        Path(bundle),
        path_or_none(against),
        tuple(threads),
        rounds,
        prompt,
        new,
        progress,
        products,
        resident,
        huge_pages,
    )
