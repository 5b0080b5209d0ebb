"""IA3 adapters combined by their factors, weighted and summed.

So does `IA3Model.add_weighted_adapter` of peft/tuners/ia3/model.py.

That is the weighted sum of what they change where the weights add up to 1. Otherwise the base's own part
counts as often as the weights' sum says: half of one adapter alone halves the layer.
"""

from __future__ import annotations

import math

import numpy as np

from vera_edge.adapters.peft_methods import IA3
from vera_edge.arrays import Float32
from vera_edge.combining.folder import Share
from vera_edge.combining.sources import Sources
from vera_edge.errors import MismatchError

FACTORS = "ia3_l"


def are_all(sources: Sources) -> bool:
    """Whether every adapter is one of IA3."""
    return all(source.adapter.method == IA3 for source in sources.each)


def combined_factors(sources: Sources, from_sum: Share) -> dict[str, dict[str, Float32]]:
    """The combined factors by module, of outputs (out, 1) or of inputs (1, in).

    from_sum: takes how far they are from the sum of the changes. Raises MismatchError unless all adapters
    scale the same layers on the same side: PEFT would let a layer shrink that one of them leaves alone.
    """
    return {module: {FACTORS: _of_layer(sources, module, from_sum)} for module in sources.modules}


def _of_layer(sources: Sources, module: str, from_sum: Share) -> Float32:
    each = sources.of(module)
    found = [source.adapter.vectors[module].arrays[FACTORS] for source in each]
    if len(found) < len(sources.each) or len({factors.shape for factors in found}) > 1:
        other = next((one.adapter for one in sources.each if one not in each), each[-1].adapter)
        raise MismatchError(
            f"linear sums factors, and {other.path} doesn't scale {module} as {each[0].adapter.path} does; "
            "take svd, with a rank"
        )
    weights = [source.weight for source in each]
    combined = np.zeros(found[0].shape, np.float64)
    for share, factors in zip(weights, found, strict=True):
        combined += share * factors.astype(np.float64)
    base, total = sources.checkpoint.dequantize(module), math.fsum(weights)
    # (l - 1) W of each, weighted and summed: l is combined, the weights' sum is what 1 becomes.
    whole = (combined - total).astype(np.float32) * base
    from_sum.add(abs(total - 1) * float(np.linalg.norm(base)), float(np.linalg.norm(whole)))
    values: Float32 = combined.astype(np.float32)
    return values
