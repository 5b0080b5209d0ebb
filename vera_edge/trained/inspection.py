"""Says what an adapter is, whether it fits a base, and what it will cost on the device."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.adapters.peft_methods import PeftTensors
from vera_edge.adapters.projection import ProjectionSpec
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.base.trained_as import TrainedAs
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.formats import blocks
from vera_edge.trained import alignment
from vera_edge.trained import model as trained_base
from vera_edge.trained.provenance import resolve_for_command, source_of, told

# Linears that read the same input, so that one product with A serves them all.
_SHARED_INPUT = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"q", "k", "v"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"wi_0", "wi_1"}),
)


@dataclass(frozen=True)
class Kind:
    """The adapted modules that differ only in their layer.

    shape: (out_features, in_features), None without a base or where the layers differ. ranges: of absolute
    values over all layers, by what was trained ("lambda_b", "lora_A.weight"). dead: how many change nothing,
    since lambda_b, say, is all zeros.
    """

    name: str
    modules: int
    shape: tuple[int, int] | None
    ranges: Mapping[str, tuple[float, float]]
    dead: int


@dataclass(frozen=True)
class Cost:
    """What side-branches cost on the device.

    vectors, projections: bytes by format; as an export stores them, int8 and int4 with their scales.
    branch_macs: multiply-accumulates per token of all branches, layers that read one input sharing the
    product with A; base_macs: of the base's linear layers. None where they depend on a base not given.
    """

    vectors: Mapping[str, int]
    projections: Mapping[str, int] | None
    branch_macs: int | None
    base_macs: int | None


@dataclass(frozen=True)
class Inspection:
    """What an adapter is.

    method: PEFT's name for it; title, does: its name and what it does to a layer, for people.
    rank: 0 where it has none. seed: VeRA's, else None.
    parameters: trained values: vectors, biases and whole modules. layers: the layer numbers it adapts.
    spec, how, verified, from_seed, digest: see `Provenance`; None where `unresolved` says why not.
    fits: None when no base was given; when false, `misfit` says why. cost: None where what was trained
    can't stand beside a base; as_pairs: whether a LoRA that is made of it can, where its rank is small.
    """

    path: str
    name: str
    adapter_digest: str
    base_name: str | None
    peft_version: str | None
    method: str
    title: str
    does: str
    rank: int
    seed: int | None
    parameters: int
    layers: tuple[int, ...]
    kinds: tuple[Kind, ...]
    biases: int
    modules_to_save: tuple[str, ...]
    dead: tuple[str, ...]
    projections_saved: bool
    spec: ProjectionSpec | None
    how: str | None
    verified: bool
    from_seed: bool | None
    digest: str | None
    unresolved: str | None
    fits: bool | None
    misfit: str | None
    notes: tuple[str, ...]
    cost: Cost | None
    as_pairs: bool = False
    embeddings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def inspect_folder(
    adapter: Path,
    base: Path | None = None,
    projection_rounding: str | None = None,
    trained_as: TrainedAs | None = None,
) -> Inspection:
    """`inspect` for a PEFT folder and a base's folder, which `trained_as` says how it was loaded in training.

    Raises as reading them does.
    """
    if base is None:
        return inspect(adapters.read(adapter), None, projection_rounding)
    try:
        checkpoint, ((read, _),) = trained_base.read(base, [(adapter, 1.0)], trained_as=trained_as)
    except MismatchError as cause:
        plain = Checkpoint.open(base, trained_as)
        found = inspect(alignment.read(adapter, plain), plain, projection_rounding)
        return found if found.misfit else replace(found, fits=False, misfit=str(cause))
    return inspect(read, checkpoint, projection_rounding)


def inspect(
    adapter: Adapter, checkpoint: Checkpoint | None = None, projection_rounding: str | None = None
) -> Inspection:
    """Describe `adapter`, and whether it fits `checkpoint` where one is given.

    Raises nothing of its own: what `resolve` refuses is told in `misfit` or `unresolved`.
    """
    found, unresolved, misfit = None, None, None
    how, notes = None, adapter.notes
    try:
        if adapter.is_vera:
            found = resolve_for_command(adapter, checkpoint, projection_rounding)
            how, notes = found.how, found.notes
        elif checkpoint is None:
            how = told(adapter)
        else:
            source = source_of(adapter, checkpoint, projection_rounding)
            how, notes = source.how, source.notes
    except MismatchError as cause:
        misfit = str(cause)
    except AdapterError as cause:
        unresolved = str(cause)
    fitting = checkpoint if misfit is None else None
    method = adapters.method_of(adapter.method, adapter.path)
    title, does = adapters.described(adapter)
    return Inspection(
        path=str(adapter.path),
        name=adapter.name,
        adapter_digest=adapter.digest,
        base_name=adapter.base_name,
        peft_version=adapter.peft_version,
        rank=adapter.rank,
        method=adapter.method,
        title=title,
        does=does,
        seed=adapter.seed if adapter.is_vera else None,
        parameters=_parameters(adapter),
        layers=tuple(sorted({number for module in adapter.vectors for number in _layer(module)})),
        kinds=_kinds(adapter, fitting),
        biases=len(adapter.biases),
        modules_to_save=tuple(sorted(adapter.modules_to_save.keys() - _frozen(adapter))),
        dead=tuple(module for module, change in adapter.vectors.items() if change.is_zero),
        projections_saved=adapter.saved is not None,
        spec=found.spec if found else None,
        how=how,
        verified=found.verified if found else False,
        from_seed=found.from_seed if found else None,
        digest=found.projections.digest if found else None,
        unresolved=unresolved,
        fits=None if checkpoint is None else misfit is None,
        misfit=misfit,
        notes=notes,
        cost=_cost(adapter, fitting, found.spec if found else None) if method.branches else None,
        as_pairs=method.low_rank,
        embeddings=tuple(adapter.embeddings),
    )


def _parameters(adapter: Adapter) -> int:
    vectors = _values(adapter) + _shared_values(adapter)
    biases = sum(bias.size for bias in adapter.biases.values())
    tables = sum(array.size for change in adapter.embeddings.values() for array in change.arrays.values())
    whole = adapter.modules_to_save.keys() - _frozen(adapter)
    sizes = sum(math.prod(adapter.modules_to_save[name].shape) for name in whole)
    return vectors + biases + sizes + tables


def _frozen(adapter: Adapter) -> frozenset[str]:
    """Tensors that aren't trained: PEFT saves the weights of adapted embeddings and heads beside what was."""
    return adapter.made | {f"{module}.weight" for module in (*adapter.vectors, *adapter.embeddings)}


def _values(adapter: Adapter) -> int:
    """How many values were trained for linear layers."""
    return sum(array.size for change in adapter.vectors.values() for array in change.trained.values())


def _shared_values(adapter: Adapter) -> int:
    """How many were trained for all layers together."""
    changes = [change for change in adapter.vectors.values() if isinstance(change, PeftTensors)]
    fixed = frozenset(name for change in changes for name in change.fixed)
    shared = (adapter.shared or {}).items()
    return sum(math.prod(raw.shape) for name, raw in shared if name.rpartition(".")[2] not in fixed)


def _layer(module: str) -> tuple[int, ...]:
    """The number of the layer a module is in: the first number in its name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return (int(match[1]),) if match else ()


def kind_of(module: str) -> str:
    """A module's name after its layer number: "self_attn.q_proj" of "model.layers.0.self_attn.q_proj"."""
    inner = re.split(r"(?:^|\.)\d+\.", module, maxsplit=1)[-1]
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inner)


def _kinds(adapter: Adapter, checkpoint: Checkpoint | None) -> tuple[Kind, ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for module in adapter.vectors:
        groups[kind_of(module)].append(module)
    kinds = []
    for name, modules in sorted(groups.items()):
        changes = [adapter.vectors[module] for module in modules]
        trained = dict.fromkeys(name for change in changes for name in change.trained)
        shapes = {checkpoint.linears[module].shape for module in modules} if checkpoint else set()
        kinds.append(
            Kind(
                name=name,
                modules=len(modules),
                shape=shapes.pop() if len(shapes) == 1 else None,
                ranges={
                    name.removeprefix("vera_"): _range(
                        change.trained[name].reshape(-1) for change in changes if name in change.trained
                    )
                    for name in trained
                },
                dead=sum(change.is_zero for change in changes),
            )
        )
    return tuple(kinds)


def _range(vectors: Iterable[np.ndarray[Any, np.dtype[np.float32]]]) -> tuple[float, float]:
    """The smallest and the largest absolute value."""
    absolute = np.abs(np.concatenate(list(vectors)))
    return float(absolute.min()), float(absolute.max())


def _cost(adapter: Adapter, checkpoint: Checkpoint | None, spec: ProjectionSpec | None) -> Cost:
    values = _values(adapter)
    projections = None
    if spec is not None:
        projections = {"fp32": 4 * spec.elements, "fp16": 2 * spec.elements}
        projections |= {name: _blocks_bytes(spec, bits) for name, bits in (("int8", 8), ("int4", 4))}
    base_macs = None
    if checkpoint is not None:
        base_macs = sum(linear.out_features * linear.in_features for linear in checkpoint.linears.values())
    return Cost(
        vectors={"fp32": 4 * values, "fp16": 2 * values},
        projections=projections,
        branch_macs=_branch_macs(adapter, checkpoint) if checkpoint is not None and adapter.adds else None,
        base_macs=base_macs,
    )


def _blocks_bytes(spec: ProjectionSpec, bits: int) -> int:
    return blocks.stored_bytes((spec.rank, spec.in_max), bits, blocks.BLOCK_OF_A) + blocks.stored_bytes(
        (spec.out_max, spec.rank), bits, blocks.block_of_b(spec.rank)
    )


def _branch_macs(adapter: Adapter, checkpoint: Checkpoint) -> int:
    """Per token: A x once for each input, then for each layer lambda_d, B and lambda_b."""
    inputs: dict[str, int] = {}
    total = 0
    for module, change in adapter.vectors.items():
        out, width = checkpoint.linears[module].shape
        if isinstance(change, LoraPair):
            total += change.rank * (width + out)
        else:
            inputs[_input_of(module)] = width
            total += adapter.rank + out * (adapter.rank + 1)
    return total + adapter.rank * sum(inputs.values())


def _input_of(module: str) -> str:
    """A name for what a linear reads, the same for linears known to read the same."""
    parent, _, last = module.rpartition(".")
    group = next((group for group in _SHARED_INPUT if last in group), {last})
    return f"{parent}.{'|'.join(sorted(group))}"
