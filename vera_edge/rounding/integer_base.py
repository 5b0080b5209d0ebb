"""A base alone rounded to integers, calibrated on text: the folder to train on that is also what is shipped.

GPTQ's storage holds any codes on an affine grid, so what is written is what our own rounding chose, and the
integers are those that `MatMulNBits` multiplies with after an export with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vera_edge import merging
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, PlanError
from vera_edge.formats.dense import DTYPES as DENSE
from vera_edge.merging.quantize import Quantized
from vera_edge.plans.plan import Step
from vera_edge.progress import Progress, silent
from vera_edge.rounding.weight_rounding import BUILT_IN, Rounding, merge_to_folder
from vera_edge.storage.files import check_output

GPTQ = "gptq"
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class IntegerForm:
    """How the integers are to be. group: inputs that share a scale, of GROUPS.

    symmetric: the zero point is in the middle and costs nothing, at up to twice the rounding error.
    """

    group: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise PlanError(
                f"groups of {self.group} inputs aren't written; choose {', '.join(map(str, GROUPS))}"
            )

    def __str__(self) -> str:
        points = "symmetric" if self.symmetric else "with zero points"
        return f"{GPTQ}, 4 bits in groups of {self.group}, {points}"


def to_folder(
    base: Path,
    out: Path,
    form: IntegerForm | None = None,
    rounding: Rounding | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Quantized:
    """Round the base's linear layers to GPTQ's integers and write the model to `out`, whole or not at all.

    base: in floats, or in another quantized format, whose exact values are then rounded. Head and embeddings
    stay as they are. rounding: compensated, on the built-in text, unless given.
    A run that was killed goes on. Raises CheckpointError for a base that is GPTQ already, PlanError for
    layers that groups of that size don't fill, DataError for unusable text, OutputError as a merge does.
    """
    form = form or IntegerForm()
    check_output(out, force, (base,))
    checkpoint = Checkpoint.open(base)
    before = sorted({one.format for one in checkpoint.linears.values() if one.format not in DENSE})
    if GPTQ in before:
        raise CheckpointError(f"{base} is GPTQ already; use it as it is, or give the model it came from")
    options = {"group_size": form.group, "sym": form.symmetric}
    ready = merging.prepare_base(checkpoint, GPTQ, options)
    steps = [step for step in ready.plan.steps if step.result == GPTQ]
    if not steps:
        raise PlanError(f"{base} has no layer in a stack that could be rounded to {GPTQ}")
    report = merge_to_folder(ready, out, rounding or Rounding(text=BUILT_IN), progress, force)
    written = Checkpoint.open(out)
    kept = tuple(step.module for step in ready.plan.steps if step.result in DENSE)
    notes = (*report.notes, *_source_notes(steps, before))
    return Quantized(
        folder=out,
        trained_as=None,
        call=None,
        dtype=str(written.config.get("torch_dtype") or written.config.get("dtype") or "float32"),
        layers=len(steps),
        kept=kept,
        digest=written.digest,
        size=report.size,
        notes=notes,
        stored=str(form),
    )


def _source_notes(steps: list[Step], before: list[str]) -> tuple[str, ...]:
    """That values were quantized before: an adapter trained on those is carried over, one on floats isn't."""
    if not before:
        return ()
    return (
        f"{len(steps)} layers were rounded from the exact values of {' and '.join(before)} weights, so this "
        "is nearest to that base, not to the floats it came from",
    )
