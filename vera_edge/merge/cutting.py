"""Cuts a plan into units, in the order in which the base's files hold what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vera_edge import tasks
from vera_edge.adapter import Adapter
from vera_edge.checkpoint import Checkpoint
from vera_edge.formats import dense
from vera_edge.merge.units import Cast, Copy, Linear, Place, Unit
from vera_edge.plan import SAME, Plan
from vera_edge.projection import Projections
from vera_edge.requantize import Codes
from vera_edge.tensors import FLOATS, RawTensor, TensorInfo

_HEAD = "lm_head.weight"


def cut(
    plan: Plan,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections,
    requantized: Mapping[str, Codes],
) -> tuple[list[Unit], bool]:
    """The units of a plan, in the order in which the base's files hold what they read, new tensors last.

    requantized: weights that were rounded elsewhere, by module. Also says whether the output head is untied
    from the embedding by it.
    """
    replaced = replacements(adapters)
    target = None if plan.others == SAME else dense.DTYPES[plan.others]
    steps = [step for step in plan.steps if f"{step.module}.weight" not in replaced]
    others = [name for name in checkpoint.other_names if name not in replaced]
    units = [_of_step(Linear(checkpoint, step, adapters, projections, requantized)) for step in steps]
    units += [_of_tensor(checkpoint, name, target) for name in others]
    files = {file: number for number, file in enumerate(checkpoint.tensors.files)}
    units.sort(key=lambda unit: min((files[info.file], info.start) for info in _infos(checkpoint, unit)))
    for name, tensor in sorted(replaced.items()):
        own = checkpoint.stored[name].dtype if name in checkpoint.stored else tensor.dtype
        own = own if own in FLOATS else tensor.dtype  # a quantized weight's bytes
        units.append(Place(name, tensor, (target or own) if tensor.dtype in FLOATS else own))
    untied = _untie(checkpoint, replaced, target)
    alone = _HEAD in replaced and _HEAD not in checkpoint.stored
    return units + untied, bool(untied) or alone


def _of_step(unit: Linear) -> Unit:
    """The work on a linear; a copy when its bytes stay, which vectors of zeros leave them too."""
    stays = unit.step.copies or (unit.on_grid and unit.delta() is None)
    return Copy(unit.checkpoint, unit.names) if stays else unit


def _of_tensor(checkpoint: Checkpoint, name: str, target: str | None) -> Unit:
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


def _infos(checkpoint: Checkpoint, unit: Unit) -> list[TensorInfo]:
    return [checkpoint.tensors[name] for name in unit.names]


def _untie(checkpoint: Checkpoint, replaced: Mapping[str, RawTensor], target: str | None) -> list[Unit]:
    """PEFT replaces an embedding alone and leaves a head that was tied to it with the base's values."""
    if _HEAD in checkpoint.tensors or _HEAD in replaced or not tied(checkpoint):
        return []
    vocabulary = checkpoint.config.get("vocab_size")
    return [
        Cast(checkpoint, name, target or checkpoint.tensors[name].dtype, _HEAD)
        for name in replaced
        if name in checkpoint.tensors
        and name
        not in checkpoint.placed  # a resized one, which PEFT saves with its head where that is another
        and dense.is_embedding(name.removesuffix(".weight"))
        and checkpoint.tensors[name].shape[0] == vocabulary
    ]


def tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head takes its weight from the embedding."""
    has_head = tasks.is_decoder(tasks.architecture(checkpoint.config))
    return has_head and checkpoint.config.get("tie_word_embeddings", True) is not False
