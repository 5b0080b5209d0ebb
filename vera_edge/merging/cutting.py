"""Cuts a plan into units, in the order in which the base's files hold what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vera_edge.adapters.adapter import Adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.formats import dense
from vera_edge.merging import tying
from vera_edge.merging.units import Cast, Copy, Linear, MergeUnit, Place
from vera_edge.plans.plan import SAME, Plan
from vera_edge.requantize import Codes
from vera_edge.storage.tensors import FLOATS, RawTensor
from vera_edge.trained.trained_model import TrainedModel


def cut(plan: Plan, model: TrainedModel, requantized: Mapping[str, Codes]) -> tuple[list[MergeUnit], bool]:
    """The units of a plan, in the order in which the base's files hold what they read, new tensors last.

    requantized: weights that were rounded elsewhere, by module. Also says whether the output head is untied
    from the embedding by it.
    """
    checkpoint, adapters = model.checkpoint, model.adapters
    replaced = replacements(adapters)
    target = None if plan.others == SAME else dense.DTYPES[plan.others]
    steps = [step for step in plan.steps if f"{step.module}.weight" not in replaced]
    others = [name for name in checkpoint.other_names if name not in replaced]
    units = [_of_step(Linear(checkpoint, step, adapters, model.projections, requantized)) for step in steps]
    units += [_of_tensor(checkpoint, name, target) for name in others]
    place = {name: number for number, name in enumerate(checkpoint.tensors)}
    units.sort(key=lambda unit: min(place[name] for name in unit.names))
    for name, tensor in sorted(replaced.items()):
        own = checkpoint.stored[name].dtype if name in checkpoint.stored else tensor.dtype
        own = own if own in FLOATS else tensor.dtype  # a quantized weight's bytes
        units.append(Place(name, tensor, (target or own) if tensor.dtype in FLOATS else own))
    apart, untied = _untie(plan, checkpoint, adapters, replaced, target)
    return units + apart, untied


def _of_step(unit: Linear) -> MergeUnit:
    """The work on a linear; a copy when its bytes stay, which vectors of zeros leave them too."""
    stays = unit.step.copies or (unit.on_grid and unit.delta() is None)
    return Copy(unit.checkpoint, unit.names) if stays else unit


def _of_tensor(checkpoint: Checkpoint, name: str, target: str | None) -> MergeUnit:
    dtype = checkpoint.tensors[name].dtype
    if target and dtype in FLOATS and dtype != target:
        return Cast(checkpoint, name, target)
    return Copy(checkpoint, (name,))


def replacements(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, RawTensor]:
    """The tensors that adapters put in place of the base's, by name.

    PEFT also saves the frozen weight of an adapted head: a copy of the base's, which the delta is added to,
    not one that replaces the sum.
    """
    found: dict[str, RawTensor] = {}
    for adapter, _ in adapters:
        frozen = {f"{module}.weight" for module in adapter.vectors}
        found |= {name: saved for name, saved in adapter.modules_to_save.items() if name not in frozen}
        found |= {f"{module}.bias": RawTensor.of(bias) for module, bias in adapter.biases.items()}
    return found


def _untie(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    replaced: Mapping[str, RawTensor],
    target: str | None,
) -> tuple[list[MergeUnit], bool]:
    """Tensors that weren't stored since they were tied, where a merge leaves two values; and whether it does.

    PEFT replaces one of a pair alone and leaves the other with the base's value.
    """
    tied = tying.pairs(checkpoint, adapters, replaced)
    values = tying.Values(plan, checkpoint, adapters, replaced)
    if not any(values.differ(head, source) for head, source in tied):
        return [], False
    units: list[MergeUnit] = []
    for pair in tied:
        for name, other in (pair, pair[::-1]):
            if name not in replaced and not values.is_stored(name) and other in checkpoint.tensors:
                units.append(Cast(checkpoint, other, target or checkpoint.tensors[other].dtype, name))
    return units, True
