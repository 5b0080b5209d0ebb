"""Rotary embeddings that remember what they saw."""

from __future__ import annotations

from typing import Any


def forget_lengths(model: Any) -> None:
    """Let dynamically scaled rotary embeddings forget the longest sequence they saw.

    transformers goes on to rotate by it until a sequence is within the original context again.
    """
    for module in model.modules():
        if "dynamic" not in str(getattr(module, "rope_type", "")):
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), buffer.clone())
