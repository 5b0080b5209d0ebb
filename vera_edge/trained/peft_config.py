"""An adapter's config as PEFT takes it, for exactly the layers that the adapter holds something for."""

from __future__ import annotations

from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.folder import CONFIG_NAME
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.peft_methods import PeftTensors
from vera_edge.arrays import Array, Float32
from vera_edge.errors import AdapterError
from vera_edge.quiet import first_line
from vera_edge.storage.tensors import FLOATS, RawTensor

# What is decided here: where it goes, and that nothing of it is made up again or searched for.
_DECIDED = {
    "base_model_name_or_path": None,
    "bias": "none",  # trained biases are put in place by who asks
    "exclude_modules": None,
    "inference_mode": True,
    "layers_pattern": None,
    "layers_to_transform": None,
}
_LORA = {
    "init_lora_weights": True,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
}


def config_of(adapter: Adapter) -> Any:
    """PEFT's config of `adapter`, by the names of its `vectors`. Raises AdapterError when PEFT refuses it."""
    import peft

    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(adapter.method)]
    known = set(kind.__dataclass_fields__)
    for key, value in adapter.config.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise AdapterError(
                f"{adapter.path / CONFIG_NAME}: {key} is {value!r}, a setting that the PEFT installed here "
                f"({peft.__version__}) doesn't know; update peft"
            )
    facts = {key: value for key, value in adapter.config.items() if key in known} | _DECIDED
    # Full names: a short one could match layers that the adapter leaves alone.
    facts["target_modules"] = sorted(adapter.vectors)
    pairs = {name: pair for name, pair in adapter.vectors.items() if isinstance(pair, LoraPair)}
    if pairs:
        facts |= _LORA | _ranks(pairs, adapter.rank)
    if "feedforward_modules" in known:
        facts["feedforward_modules"] = _scaling_inputs(adapter)
    try:
        return kind(**{key: value for key, value in facts.items() if key in known})
    except (TypeError, ValueError) as cause:
        raise AdapterError(f"PEFT can't read the config of {adapter.path}: {first_line(cause)}") from None


def _ranks(pairs: dict[str, LoraPair], rank: int) -> dict[str, Any]:
    """Ranks and scales by layer, as read: the patterns that gave them went by the names PEFT had."""
    alphas = {name: pair.scale * pair.rank for name, pair in pairs.items()}
    alpha = next(iter(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {name: pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_bias": any(pair.bias is not None for pair in pairs.values()),
    }


def _scaling_inputs(adapter: Adapter) -> list[str]:
    """The layers whose inputs IA3 scales, not their outputs: by the shape of what it trained."""
    return sorted(
        module for module, change in adapter.vectors.items() if len(change.arrays.get("ia3_l", [0, 0])) == 1
    )


def state_of(adapter: Adapter) -> dict[str, Any]:
    """What `adapter` trained for its layers, and what they share, in torch under PEFT's names."""
    import numpy as np
    import torch

    state: dict[str, Any] = {}
    for module, change in adapter.vectors.items():
        values = change.raw if isinstance(change, PeftTensors) else change.arrays
        state |= {f"base_model.model.{module}.{name}": _plain(array) for name, array in values.items()}
    state |= {name: _plain(raw) for name, raw in (adapter.shared or {}).items()}
    return {name: torch.from_numpy(np.array(values)) for name, values in state.items()}


def _plain(values: RawTensor | Float32) -> Array:
    """As numpy has it: floats in float32, integers as they are."""
    if not isinstance(values, RawTensor):
        return values
    return values.float32() if values.dtype in FLOATS else values.array()
