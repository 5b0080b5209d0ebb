"""Several tensors combined into one, value by value: sums, pruning, and elected signs.

What each means is what peft/utils/merge_utils.py computes: TIES (Yadav et al., NeurIPS 2023) keeps the
largest values of each, elects a sign for every place and takes the mean of those that have it; DARE (Yu et
al., ICML 2024) keeps values at random and scales them up by what was dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.combining.combination import Combination


def combined(tensors: Sequence[Float32], weights: Sequence[float], asked: Combination, name: str) -> Float32:
    """Tensors of one shape, each with its weight, as one, float32.

    name: tells this tensor's draws from those of others. The same for the same name and seed.
    """
    pruned = [_pruned(tensor, asked, f"{name} {number}") for number, tensor in enumerate(tensors)]
    agrees = _agreeing(pruned, asked) if asked.elects else None
    total = np.zeros(tensors[0].shape, np.float32)
    for number, (tensor, weight) in enumerate(zip(pruned, weights, strict=True)):
        part = np.float32(weight) * tensor
        total += part if agrees is None else part * agrees[number]
    if agrees is not None:
        total /= np.maximum(np.sum(agrees, axis=0, dtype=np.float32), np.float32(1))
    return total


def _pruned(tensor: Float32, asked: Combination, name: str) -> Float32:
    """The share of its values that is kept, zeros elsewhere."""
    density = asked.density
    if density is None or density >= 1:
        return tensor
    if asked.is_random:
        kept = _generator(asked.seed or 0, name).random(tensor.shape, np.float32) < density
        return np.where(kept, tensor / np.float32(density), np.float32(0))
    count = int(density * tensor.size)
    flat = tensor.reshape(-1)
    chosen = np.argpartition(-np.abs(flat), count)[:count]
    result = np.zeros_like(flat)
    result[chosen] = flat[chosen]
    return result.reshape(tensor.shape)


def _agreeing(tensors: Sequence[Float32], asked: Combination) -> list[npt.NDArray[np.bool_]]:
    """Where each tensor's sign is the majority's; a zero's never is."""
    voices = tensors if asked.majority_sign != "frequency" else [np.sign(tensor) for tensor in tensors]
    majority = np.where(np.sum(voices, axis=0) >= 0, 1, -1)
    return [np.sign(tensor) == majority for tensor in tensors]


def _generator(seed: int, name: str) -> np.random.Generator:
    """One stream for each name, so that no draw depends on what else is combined."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64([seed, *np.frombuffer(digest, np.uint32).tolist()]))
