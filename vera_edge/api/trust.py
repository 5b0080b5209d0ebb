"""Whose signature a bundle must carry: what `verify`, `install`, `fetch` and their like have in common."""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath, path_or_none
from vera_edge.bundle import signing
from vera_edge.bundle.signing import Trust
from vera_edge.errors import PlanError
from vera_edge.progress import Tell


def trust_in(
    trusted_keys: StrPath | None,
    trusted_identity: tuple[str, str] | None,
    require_signature: bool,
    allow_unsigned: bool,
) -> Trust:
    """The policy that these words make: where a key or an identity is named, a signature is required.

    Raises PlanError when they contradict each other.
    """
    if require_signature and allow_unsigned:
        raise PlanError("require_signature and allow_unsigned contradict each other; leave one of them out")
    named = trusted_keys is not None or trusted_identity is not None
    required = require_signature or (named and not allow_unsigned)
    return Trust(path_or_none(trusted_keys), required, trusted_identity)


def check_signature(folder: Path, trust: Trust, tell: Tell) -> None:
    """Hold a bundle to `trust`, as `signing.check` does, and tell who signed it."""
    signature = signing.check(folder, trust)
    if signature is not None:
        tell(f"signed by {signature.by}")
    elif trust.keys is not None or trust.identity is not None:
        tell(f"{folder} isn't signed, which --allow-unsigned lets pass")
