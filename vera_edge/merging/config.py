"""The config.json of a merged model: the base's, with what the merge changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vera_edge import formats
from vera_edge.base.checkpoint import NAMED_WEIGHTS, Checkpoint
from vera_edge.base.trained_as.config import with_dtype, without_kernels, without_local_code
from vera_edge.errors import PlanError
from vera_edge.formats import checks
from vera_edge.merging.tying import scales_by_tying
from vera_edge.plans.plan import DENSE, Plan, Step

_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Output heads that transformers leaves unquantized by itself; their tensor is absent when they're tied.
_HEADS = ("lm_head", "embed_out", "predictions.decoder")


def merged_config(plan: Plan, checkpoint: Checkpoint, untied: bool) -> dict[str, Any]:
    """config.json of the merged model. `untied`: the head got a tensor of its own.

    Raises PlanError when the plan mixes quantized formats, which no config can describe.
    """
    plain = without_kernels(checkpoint.config)
    given = {key: value for key, value in plain.items() if key != NAMED_WEIGHTS}
    quantization, same = _quantization_config(plan, checkpoint)
    config = checks.with_quantization(given, quantization) if same else checks.without_quantization(given)
    if plan.others in _TORCH_NAMES:
        config = with_dtype(config, _TORCH_NAMES[plan.others])
        config.setdefault("dtype", _TORCH_NAMES[plan.others])
    if untied and not scales_by_tying(config):
        config = _untied(config) | {"tie_word_embeddings": False}
    config = without_local_code(config)
    if quantization and not same:
        config["quantization_config"] = quantization
    return config


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with nothing tied, in the models within it neither."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        changed[key] = _untied(value) if isinstance(value, Mapping) else value
    return changed | ({"tie_word_embeddings": False} if "tie_word_embeddings" in changed else {})


def _quantization_config(plan: Plan, checkpoint: Checkpoint) -> tuple[dict[str, Any], bool]:
    """What config.json says of the weights, nothing for floats; and whether it's the base's own."""
    quantized = [step for step in plan.steps if step.result not in DENSE]
    if not quantized:
        return {}, False
    results = sorted({step.result for step in quantized})
    if len(results) > 1:
        raise PlanError(
            f"one model can't hold {' and '.join(results)} weights together; choose one with --to"
        )
    before = checks.quantization(checkpoint.config)
    if {step.source for step in quantized} == set(results):
        return dict(before) | _raised(plan, before) | _new_heads(plan, checkpoint, before), True
    target = formats.get(results[0])
    fresh = target.quantization_config(quantized[0].options) or {}
    if fresh.get("quant_method") == "bitsandbytes":
        return fresh | _bitsandbytes_extras(plan, checkpoint, before), False
    key, skipped = getattr(target, "skip_key", None), skip_modules(plan.steps)
    if key and skipped:
        fresh[key] = sorted({*fresh.get(key, ()), *skipped})
    return fresh, False


def _bitsandbytes_extras(plan: Plan, checkpoint: Checkpoint, before: Mapping[str, Any]) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if plan.weights in ("nf4", "fp4"):
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
        extras["bnb_4bit_compute_dtype"] = before.get("bnb_4bit_compute_dtype", dtype)
    skipped = before.get("llm_int8_skip_modules")
    if skipped is None:
        skipped = skip_modules(plan.steps)
    return extras | ({"llm_int8_skip_modules": skipped} if skipped else {})


def _raised(plan: Plan, before: Mapping[str, Any]) -> dict[str, Any]:
    """What the base's own quantization_config must say of layers that were quantized and aren't any more."""
    raised = [step.module for step in plan.steps if step.result in DENSE and step.source not in DENSE]
    if not raised:
        return {}
    if checks.method({"quantization_config": before}) != "bitsandbytes":
        raise PlanError(
            f"{raised[0]} can't become a float layer beside others that stay quantized as they are; choose "
            "one format with --to"
        )
    known = before.get("llm_int8_skip_modules")
    return {"llm_int8_skip_modules": sorted({*known, *raised}) if known else skip_modules(plan.steps)}


def _new_heads(plan: Plan, checkpoint: Checkpoint, before: Mapping[str, Any]) -> dict[str, Any]:
    """What the base's own quantization_config must say of linears that an adapter brought: they're floats."""
    new = [step.module for step in plan.steps if f"{step.module}.weight" in checkpoint.placed]
    quantized = next(step for step in plan.steps if step.result not in DENSE)
    bitsandbytes = before.get("quant_method") == "bitsandbytes"
    target = formats.get(quantized.result)
    key = "llm_int8_skip_modules" if bitsandbytes else getattr(target, "skip_key", None)
    if not new or key is None:
        return {}
    known = before.get(key) or (skip_modules(plan.steps) if bitsandbytes else None) or []
    return {key: sorted({*known, *new})}


def skip_modules(steps: tuple[Step, ...]) -> list[str] | None:
    """The modules that transformers must not replace by quantized ones; None when its own rule finds them.

    Its rule leaves out the output head. Named ones replace that rule, so the head is then named too.
    """
    dense = [step.module for step in steps if step.result in DENSE]
    if all(module.endswith(_HEADS) for module in dense):
        return None
    quantized = [step.module for step in steps if step.result not in DENSE]
    heads = [name for name in _HEADS if not any(module.endswith(name) for module in (*quantized, *dense))]
    return sorted([*dense, *heads])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
