"""Writes one golden checkpoint: what a format's own library stored, and what it says the values are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(
    folder: Path,
    quantization: Mapping[str, Any],
    tensors: Mapping[str, Any],
    expected: Mapping[str, Any],
    versions: str,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write config.json and model.safetensors, and expected.safetensors: float32 (out, in) by module name."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "golden_made_with": versions, "quantization_config": dict(quantization)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    stored = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata or {"format": "pt"})
    values = {
        name: tensor.detach().to(torch.float32).contiguous().clone() for name, tensor in expected.items()
    }
    save_file(values, folder / "expected.safetensors")
