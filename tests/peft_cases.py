"""Bases for which PEFT rounds its projections differently, and adapters the installed PEFT makes on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import tiny

TARGETS = ("q_proj", "v_proj", "down_proj")
BASES = (
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "nf4",
    "nf4-bf16",
    "nf4-fp16",
    "nf4-stored-bf16",
    "nf4-bf16-stored-fp16",
    "mixed",
)


@dataclass(frozen=True)
class Case:
    """An adapter on one of the BASES; `config` goes to VeraConfig."""

    base: str
    seed: int = 41
    targets: tuple[str, ...] = TARGETS
    config: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    **{f"unsaved-{base}": Case(base) for base in BASES},
    "saved-fp32": Case("fp32", config={"save_projection": True}),
    "saved-bf16": Case("bf16", seed=2**32 + 3, config={"save_projection": True}),
    "one-layer": Case("fp32", targets=("up_proj", "k_proj"), config={"layers_to_transform": [1]}),
    "modules-to-save": Case("fp32", config={"modules_to_save": ["norm"]}),
}


def base_folder(llama: tiny.TinyLlama, name: str) -> Path:
    """The folder of one of the BASES, made when first asked for. "nf4-X-stored-Y": compute X, storage Y."""
    if name in ("fp32", "bf16", "fp16", "int8", "nf4"):
        return Path(getattr(llama, name))
    folder = llama.root / name
    if folder.exists():
        return folder
    if name == "mixed":
        model = load_base(folder, llama)
        return tiny.save(model, folder)
    compute, _, storage = name.removeprefix("nf4-").rpartition("stored-")
    names = {"bf16": "bfloat16", "fp16": "float16", "": "float32"}
    options: dict[str, Any] = {
        "compute": names[(compute or ("" if "stored" in name else storage)).strip("-")]
    }
    if "stored" in name:
        options["bnb_4bit_quant_storage"] = names[storage]
    return tiny.quantize(llama.fp32, folder, **tiny.four_bit("nf4", **options))


def load_base(folder: Path, llama: tiny.TinyLlama) -> Any:
    """The base as someone who trains on it loads it."""
    import torch

    if folder.name == "mixed":
        model = tiny.load(llama.fp32)
        model.model.layers[0].mlp.down_proj.to(torch.bfloat16)
        return model
    # transformers 4 casts 4-bit weights that are stored as floats to the dtype asked for, and so breaks them:
    # such a base is only ever loaded in its storage dtype.
    stored = folder.name.rpartition("stored-")[2]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return tiny.load(folder, dtype=dtypes.get(stored, torch.float32))


def make(case: Case, llama: tiny.TinyLlama, folder: Path) -> tuple[Any, Any]:
    """Make the adapter and save it to `folder`; returns the (A, B) that PEFT held, as numpy float32.

    Raises RuntimeError when PEFT sized them by the packed weights of a 4-bit base, as 0.12 does: such an
    adapter fails at its first forward, so nobody can have trained one.
    """
    from peft import VeraConfig, get_peft_model

    options = {"save_projection": False, **case.config}
    config = VeraConfig(r=4, projection_prng_key=case.seed, target_modules=list(case.targets), **options)
    model = get_peft_model(load_base(base_folder(llama, case.base), llama), config)
    tiny.randomize(model, 0.25, 5)
    model.peft_config["default"].base_model_name_or_path = case.base  # not this machine's path
    model.save_pretrained(folder)
    a, b = (getattr(model.base_model, name)["default"].float().numpy() for name in ("vera_A", "vera_B"))
    adapted = [module for module in model.modules() if hasattr(module, "vera_lambda_b")]
    if a.shape[1] < max(module.in_features for module in adapted):
        raise RuntimeError(f"vera_A has shape {a.shape}, too small for the layers")
    return a, b
