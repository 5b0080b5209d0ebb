"""What PEFT rounds the projections to on each kind of base: the rules, version by version.

PEFT casts the shared projections to the dtype of each layer it adapts, as it adapts it, and widens them to
float32 again in the end. Which dtype that is, for a quantized layer, is nowhere written down; the rules here
were found by running PEFT 0.12 to 0.21, except those for GPTQ and AWQ, which follow from its source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import ProjectionDtype
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError
from vera_edge.formats import StoredLinear, checks

ASK = "give the dtype with --projection-rounding float32, bfloat16 or float16"

# As torch spells them, as vera-edge's weight formats do, and as safetensors does.
_SPELLINGS: Mapping[ProjectionDtype, tuple[str, ...]] = {
    "float32": ("float32", "fp32", "F32"),
    "bfloat16": ("bfloat16", "bf16", "BF16"),
    "float16": ("float16", "fp16", "F16"),
    "float8_e4m3fn": ("float8_e4m3fn", "fp8"),
}
NAMES: Mapping[str, ProjectionDtype] = {name: key for key, names in _SPELLINGS.items() for name in names}
# Bases whose weights are integers, or no attribute called weight: PEFT has no float dtype to round to there.
_AS_DRAWN = {"int8": "an LLM.int8 base", "hqq": "an HQQ base", "awq": "an AWQ base"} | dict.fromkeys(
    ("gptq", "gptq8"), "a GPTQ base"
)
_STORAGES = {"float32": "uint8 or float32", "bfloat16": "bfloat16", "float16": "float16"}


def infer(adapter: Adapter, checkpoint: Checkpoint) -> tuple[ProjectionDtype, str]:
    """What PEFT rounded the adapter's projections to, and why, as the second half of a sentence.

    Raises AdapterError, asking for the dtype, when base and PEFT version don't tell.
    """
    reasons: dict[ProjectionDtype, str] = {}
    for module in adapter.vectors:
        linear = checkpoint.linears[module]
        rounding, why = of_layer(checkpoint, linear, adapter.peft_version, str(adapter.path))
        reasons.setdefault(rounding, why)
    # The layers share one pair of buffers, cast to each layer's dtype in turn: the coarsest cast remains.
    coarse = sorted(rounding for rounding in reasons if rounding != "float32")
    if len(coarse) > 1:
        raise AdapterError(
            f"{adapter.path} adapts layers that PEFT rounds to {coarse[0]} and others it rounds to "
            f"{coarse[1]}, one after the other; train with save_projection=True, for neither is what it used"
        )
    rounding = coarse[0] if coarse else "float32"
    return rounding, reasons[rounding]


def of_layer(
    checkpoint: Checkpoint, linear: StoredLinear, version: str | None, adapter: str = "an adapter"
) -> tuple[ProjectionDtype, str]:
    """What PEFT of a version rounds the shared projections to when it adapts this layer, and why.

    adapter: what it is called in an error. Raises AdapterError when base and version don't tell.
    """
    if linear.format in NAMES:
        rounding = NAMES[linear.format]
        return rounding, f"PEFT {_does(rounding)} on a base in {rounding}"
    if linear.format in _AS_DRAWN:
        return "float32", f"PEFT {_does('float32')} on {_AS_DRAWN[linear.format]}"
    if linear.format == "torchao":
        return _torchao_rounding(checkpoint.config)
    if linear.format in ("nf4", "fp4"):
        return _four_bit_rounding(version, adapter, checkpoint.config, linear)
    raise AdapterError(
        f"how PEFT rounded the projections on a {linear.format} base isn't known ({linear.module}); {ASK}"
    )


def _torchao_rounding(config: Mapping[str, Any]) -> tuple[ProjectionDtype, str]:
    """A torchao weight says it is of the dtype it had before it was quantized."""
    given = config.get("dtype") or config.get("torch_dtype")
    rounding = NAMES.get(str(given).removeprefix("torch."))
    if rounding is None:
        raise AdapterError(f"the torchao base's config gives {given!r} as its dtype; {ASK}")
    return rounding, f"PEFT {_does(rounding)} on a torchao base of dtype {rounding}"


def _four_bit_rounding(
    version: str | None, adapter: str, config: Mapping[str, Any], linear: StoredLinear
) -> tuple[ProjectionDtype, str]:
    """PEFT 0.19 and later round to the 4-bit layer's compute dtype, earlier ones to its storage dtype.

    See https://github.com/huggingface/peft/pull/2893.
    """
    given = checks.quantization(config).get("bnb_4bit_compute_dtype")
    compute = NAMES.get(str(given or "float32").removeprefix("torch."))
    if compute is None:
        raise AdapterError(
            f"bnb_4bit_compute_dtype {given!r} of the base isn't a dtype PEFT rounds to; {ASK}"
        )
    storage = NAMES.get(str(linear.params.get("storage")), "float32")
    if compute == storage:
        return compute, f"PEFT of any version {_does(compute)} on a 4-bit base that computes in {compute}"
    newer = rounds_to_compute_dtype(version)
    if newer is None:
        raise AdapterError(
            f"PEFT {version} may have rounded the projections of {adapter} to {compute} or "
            f"to {storage}; {ASK}"
        )
    name = version or "before 0.18.1 (it records no version)"
    if newer:
        return compute, f"PEFT {name} {_does(compute)} on a 4-bit base that computes in {compute}"
    return storage, f"PEFT {name} {_does(storage)} on a 4-bit base stored as {_STORAGES[storage]}"


def _does(rounding: ProjectionDtype) -> str:
    return "leaves them as drawn" if rounding == "float32" else f"rounds them to {rounding}"


def rounds_to_compute_dtype(version: str | None) -> bool | None:
    """Whether this PEFT rounds to the compute dtype; None for a development version that may or may not.

    PEFT before 0.18.1 writes no version, so none at all means an old one.
    """
    if version is None:
        return False
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)$", version)
    if match is None:
        return None
    release = (int(match[1]), int(match[2]), int(match[3]))
    if "dev" in match[4] and (0, 18, 1) <= release <= (0, 19, 0):
        return None
    return release >= (0, 19, 0)
