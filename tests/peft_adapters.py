"""Adapters of any PEFT method on tiny models, made and saved by PEFT, with seeded values as if trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests import tiny

SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]
# Method -> its config's class and options.
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "VERA": ("VeraConfig", {"r": 8}),
    "LORA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "LORA, use_dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "ADALORA": ("AdaLoraConfig", {"total_step": 10, "init_r": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 16}),
    "DEFT": ("DeftConfig", {}),
    "DELORA": ("DeloraConfig", {"r": 4}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 50}),
    "GRALORA": ("GraloraConfig", {"r": 8, "gralora_k": 2}),
    "HIRA": ("HiraConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LOHA": ("LoHaConfig", {"r": 4, "rank_pattern": {"q_proj": 2}}),
    "LOKR": ("LoKrConfig", {"r": 4}),
    "MISS": ("MissConfig", {"r": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "r": 0}),
    "PEANUT": ("PeanutConfig", {}),
    "PVERA": ("PveraConfig", {"r": 8}),
    "RANDLORA": ("RandLoraConfig", {"r": 4, "save_projection": True}),
    "ROAD": ("RoadConfig", {"group_size": 32}),
    "SHIRA": ("ShiraConfig", {"r": 2}),
    "SUPERTUNING": ("SupertuningConfig", {}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 16, "vector_length": 16}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 32}),
}
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


def save_method(base: Path, folder: Path, method: str) -> Path:
    """An adapter of one of METHODS on some layers of `base`."""
    import peft

    cls, options = METHODS[method]
    settings = getattr(peft, cls)(target_modules=SOME, task_type="CAUSAL_LM", **options)
    return save(base, folder, settings)


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
