"""Adapters of any PEFT method on tiny models, made and saved by PEFT, with seeded values as if trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny

TOKENS = torch.arange(3, 43)[None] * 5 % tiny.VOCABULARY
Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor | None]


def save(
    base: Path,
    folder: Path,
    settings: Any,
    strength: float = 0.1,
    change: Change | None = None,
    seed: int = 5,
) -> Path:
    """An adapter of the method of `settings` on `base`, every trained value moved by seeded noise.

    change: gives what a parameter becomes instead, of its name, its values and what draws; None for noise.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    model: Any = get_peft_model(tiny.load(base), settings)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and parameter.dtype.is_floating_point:
                found = None if change is None else change(name, parameter.data, draw)
                if found is None:
                    found = parameter + strength * torch.randn(parameter.shape, generator=draw)
                parameter.copy_(found)
        model.save_pretrained(folder)
    return folder


def unmerged(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` beside it, by PEFT alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def logits(model: Any) -> torch.Tensor:
    """The logits (n, vocabulary) of a short text."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits[0].float()
    return found


def close(mine: torch.Tensor, truth: torch.Tensor) -> bool:
    """Within 1e-4 of the logits' scale."""
    return bool((mine - truth).abs().max() < 1e-4 * truth.abs().max())
