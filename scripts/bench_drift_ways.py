"""Our ways to ship the demo's adapter, and PEFT's, as rows of the drift tables."""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scripts.bench_drift_rows import PEFT, Bench, Made, Way
from scripts.prepare_demo import ROOT, Demo
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import target
from vera_edge.measuring.artefact import folder_bytes
from vera_edge.plans.plan import Plan
from vera_edge.precision import PlanRequest
from vera_edge.precision.choose import choose
from vera_edge.precision.sizes import step_bytes
from vera_edge.reference import model as reference
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder
from vera_edge.text.mixture import Mixture

# bitsandbytes' NF4 in blocks of 64 with double-quantized absmax: 8 bits a block, 32 for each 256 blocks.
NF4_BITS = 4 + 8 / 64 + 32 / 64 / 256
PROMPT = 'What does the Python reference say about "The "import" statement"?'
SPOKEN = 64  # tokens generated to measure speed
_SIMPLE = ("rtn", "hqq", "search")
_CALIBRATED = (
    "reference/calibration",
    "reference/ends",
    "rounding/writeback",
    "rounding/weight_rounding",
    "text/mixture",
)
SHORT = (
    ("fp32 merged", "merged", "fp32", None),
    ("int8 merged", "merged", "int8", None),
    ("int4 merged", "merged", "int4", None),
    ("nf4 branch", "branch", "nf4", None),
    ("int8 branch", "branch", "int8", None),
    ("int4 branch", "branch", "int4", None),
)
MORE = (
    ("int4 merged, rounded to nearest", "merged", "int4", "rtn"),
    ("int4 merged, hqq", "merged", "int4", "hqq"),
    ("int4 merged, search", "merged", "int4", "search"),
    ("int8 merged, gptq", "merged", "int8", "gptq"),
)
# A plan for speed: what layers and head may be, and the KL it stays within, twelve per cent of the effect.
BLOCKS = "plan of 12% in blocks of 32 and 64"
_BLOCK_FORMATS, _BLOCKS_KL = ("int4:32", "int4:64", "int8:64"), 0.0535
EXPANDED = "nf4 branch, int8 head, run as int8 blocks"
RANK = 8
LOW_RANK = f"int4 merged, low-rank {RANK}"
# Name, mode, weights, and the exporter's options.
VARIED = (
    ("int8 merged, activations in float32", "merged", "int8", {"accuracy_level": "0"}),
    ("int8 merged, head reads int16", "merged", "int8", {"head_activations": "int16"}),
    ("int8 merged, blocks of 64", "merged", "int8", {"block": "64"}),
    ("int4 merged, int4 head", "merged", "int4", {"head": "int4"}),
    ("int4 merged, blocks of 64", "merged", "int4", {"block": "64"}),
    ("int4 merged, blocks of 64, int4 head", "merged", "int4", {"block": "64", "head": "int4"}),
    ("int4 branch, int4 projections", "branch", "int4", {"projections": "int4"}),
    ("int8 branch, fp32 projections", "branch", "int8", {"projections": "fp32"}),
)
# A plan for speed: what layers and head may be, and the KL it stays within, twelve per cent of the effect.
BLOCKS = "plan of 12% in blocks of 32 and 64"
_BLOCK_FORMATS, _BLOCKS_KL = ("int4:32", "int4:64", "int8:64"), 0.0535
EXPANDED = "nf4 branch, int8 head, run as int8 blocks"
RANK = 8
LOW_RANK = f"int4 merged, low-rank {RANK}"


def short(demo: Demo, out: Path) -> list[Way]:
    """The ways of the README's table."""
    exports = [
        Way(row[0], partial(_exported, demo, out, *row), rounding_code(), spoken=True) for row in SHORT
    ]
    merged = Way("nf4 merged back (vera-edge merge)", partial(_merged, demo, out, None), rounding_code())
    peft = Way(PEFT, partial(_peft, demo, out), f"peft {version('peft')}", spoken=True)
    return [*exports, merged, peft]


def more(demo: Demo, out: Path, bench: Bench) -> Iterator[Way]:
    """Other methods on the same grids, and mixes that `plan` chooses for a share of the adapter's effect."""
    for row in MORE:
        yield Way(row[0], partial(_exported, demo, out, *row), rounding_code(row[3]))
    yield Way(LOW_RANK, partial(_low_rank, demo, out), rounding_code())
    for name, mode, weights, options in VARIED:
        yield Way(name, partial(_exported, demo, out, name, mode, weights, None, options), rounding_code())
    for method in ("rtn", "hqq", "search"):
        name = "rounded to nearest" if method == "rtn" else method
        yield Way(f"nf4 merged back, {name}", partial(_merged, demo, out, method), rounding_code(method))
    for share, mode in ((0.03, "merged"), (0.06, "merged"), (0.03, "branch")):
        name = f"plan, {share:.0%} of the effect, {mode}"
        yield Way(name, partial(_planned, demo, out, bench, share, mode), rounding_code())
    yield Way(EXPANDED, partial(_expanded, demo, out), rounding_code("rtn"))
    yield Way(BLOCKS, partial(_planned_blocks, demo, out), rounding_code())


def rounding_code(method: str = "") -> str:
    """A digest of what decides how weights are rounded: by one of the simple methods, or at all."""
    folder = ROOT / "vera_edge" / "requantize"
    if method in _SIMPLE:
        files = [folder / f"{name}.py" for name in ("grids", *_SIMPLE)]
    else:
        files = sorted(folder.glob("*.py"))
        files += [ROOT / "vera_edge" / f"{name}.py" for name in _CALIBRATED]
        files += sorted((ROOT / "vera_edge" / "text" / "built_in" / "calibration").glob("*.txt"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _exported(
    demo: Demo,
    out: Path,
    name: str,
    mode: str,
    weights: str,
    method: str | None,
    options: Mapping[str, str] = MappingProxyType({}),
    recover: tuple[str, ...] = (),
) -> Made:
    folder = _folder(out, name)
    made = target.export(
        demo.base,
        [(demo.adapter, 1.0)],
        folder,
        mode=mode,
        weights=weights,
        options=options,
        force=True,
        rounding=Rounding(method, Mixture.of(str(demo.calibration_text)), recover=recover),
    )
    return _open(folder, made.plan)


def _folder(out: Path, name: str) -> Path:
    return out / name.replace(" ", "-").replace(",", "")


def _expanded(demo: Demo, out: Path) -> Made:
    """NF4 as vera_edge.device runs it."""
    made = _exported(demo, out, EXPANDED, "branch", "nf4", None, {"head": "int8"})
    return replace(made, runner=Session.open(_folder(out, EXPANDED), four_bit="expanded"), speed=None)


def _low_rank(demo: Demo, out: Path) -> Made:
    """int4 with a term of rank RANK beside each layer, in float16."""
    made = _exported(demo, out, LOW_RANK, "merged", "int4", None, recover=(f"low-rank={RANK}",))
    shapes = [linear.shape for linear in Checkpoint.open(demo.base).linears.values()]
    term = sum(16 * RANK * sum(shape) for shape in shapes)
    return replace(made, bits=made.bits + term / sum(rows * columns for rows, columns in shapes))


def _planned(demo: Demo, out: Path, bench: Bench, share: float, mode: str) -> Made:
    """Within a share of the adapter's effect."""
    folder, limit = out / f"planned-{mode}", share * next(iter(bench.bare.texts.values())).kl
    return _open(folder, _plan(demo, folder, PlanRequest(max_kl=limit, mode=mode)))


def _planned_blocks(demo: Demo, out: Path) -> Made:
    folder = out / "planned-blocks"
    return _open(folder, plan_blocks(demo, folder))


def plan_blocks(demo: Demo, folder: Path) -> Plan:
    """The plan for speed, merged, exported to `folder`."""
    return _plan(demo, folder, PlanRequest(max_kl=_BLOCKS_KL, formats=_BLOCK_FORMATS))


def _plan(demo: Demo, folder: Path, request: PlanRequest) -> Plan:
    """Planned on the text of the training, since the measured one must be new to it."""
    text = Mixture.of(str(demo.calibration_text))
    request = replace(request, calibration=text, data=str(demo.train_text))
    return choose(demo.base, [(demo.adapter, 1.0)], request, folder, keep=folder).plan


def _open(folder: Path, plan: Plan) -> Made:
    session = Session.open(folder)
    weights = sum(step.shape[0] * step.shape[1] for step in plan.steps)
    bits = 8 * sum(step_bytes(step) for step in plan.steps) / weights
    return Made(session, bits, folder_bytes(folder), partial(_session_speed, session))


def _session_speed(session: Session) -> float:
    """Tokens per second after the first token, best of three."""
    speeds = []
    for _ in range(3):
        generation = session.generate(PROMPT, max_tokens=SPOKEN)
        for _ in generation:
            pass
        speeds.append(float(generation.summary()["tokens_per_second"]))
    return max(speeds)


def _merged(demo: Demo, out: Path, method: str | None) -> Made:
    """Merged back into NF4; a Hugging Face folder, measured on its exact values."""
    folder = out / "merged-nf4"
    ready = merge.prepare(demo.base, [(demo.adapter, 1.0)], "nf4")
    merge_to_folder(ready, folder, Rounding(method, Mixture.of(str(demo.calibration_text))), force=True)
    return Made(reference.open_reference(Checkpoint.open(folder)), NF4_BITS, folder_bytes(folder))


def _peft(demo: Demo, out: Path) -> Made:
    """What PEFT itself makes of base and adapter: loaded fresh, merged before any forward."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.base, device_map="cpu", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, demo.adapter).merge_and_unload().eval()
    saved = copy.deepcopy(merged)  # bitsandbytes repacks a model in place at its first forward
    return Made(
        reference.TorchReference(merged, int(merged.config.vocab_size), has_adapter=False),
        NF4_BITS,
        _saved_size(saved, out / "peft-nf4"),
        lambda: max(_torch_speed(merged, demo.base) for _ in range(2)),
    )


def _torch_speed(model: Any, base: Path) -> float:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": PROMPT}]
    asked = AutoTokenizer.from_pretrained(base).apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    started = time.monotonic()
    model.generate(**asked, max_new_tokens=1, do_sample=False)
    first = time.monotonic() - started
    started = time.monotonic()
    length = model.generate(**asked, max_new_tokens=SPOKEN // 4, do_sample=False).shape[1]
    return float((length - asked["input_ids"].shape[1] - 1) / (time.monotonic() - started - first))


def _saved_size(model: Any, out: Path) -> int | None:
    try:
        model.save_pretrained(out)
    except NotImplementedError as cause:
        print(f"{PEFT}: save_pretrained raises NotImplementedError {cause}", file=sys.stderr)
        return None
    return folder_bytes(out)
