"""Every reader of what comes from outside, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzzing import adapters, bases, bundles, links, settings, signatures, texts
from tests.fuzzing.target import Target

_SUITE = (
    *adapters.TARGETS,
    *bases.TARGETS,
    *bundles.TARGETS,
    *texts.TARGETS,
    *settings.TARGETS,
    *links.TARGETS,
    *signatures.TARGETS,
)
SUITE: Mapping[str, Target] = {target.name: target for target in _SUITE}
# Too slow for the suite, not for scripts/fuzz.
ALL: Mapping[str, Target] = {**SUITE, **{target.name: target for target in texts.SLOW}}
