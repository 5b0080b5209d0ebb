"""A model to draw a graph from whose matrices cost nothing: every row is one number, the row's own.

The builder packs, splits, cuts and transposes weights. Of a matrix in which each row repeats one number, that
number says afterwards which row of which weight lies where, and torch holds it once: with a stride of 0. What
isn't a matrix (norms, biases) has its real values.

Only moving rows about keeps their numbers true. So while the builder works, whatever else it does with such a
matrix ends the drawing (`Computed`), and the graph is drawn from the model itself then. Numbers are drawn at
random out of 2^27, so that a number computed from one is no other row's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from vera_edge.arrays import Float32, Int64
from vera_edge.formats.dense import is_embedding
from vera_edge.merging.computed import ComputedTensors
from vera_edge.reference.loading import LOCAL
from vera_edge_onnx.graph.computed import ComputedWeight, nothing
from vera_edge_onnx.graph.parts import Part, put_together

_LOWEST, _HIGHEST = 2.0**-8, 2.0**8  # 16 exponents of 2^23 numbers each
_MOST_ROWS = 1 << 24
_SEED = 15
_SAMPLE = 4096


class Computed(Exception):
    """A weight isn't rows of the model's any more, so what it holds can't be told from a skeleton."""


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The tensors of a model by name, as a builder is given them.

    marks: the number of each row, of all matrices one after the other. starts: where each one's begin, by
    name.
    """

    source: ComputedTensors
    tensors: Mapping[str, torch.Tensor]
    marks: Float32
    starts: Mapping[str, int]

    @classmethod
    def of(cls, source: ComputedTensors) -> Skeleton:
        """Raises Computed for a model of too many rows, CheckpointError where a tensor isn't sound."""
        linears = source.linears
        matrices = {
            name: linears[module].shape if module in linears else info.shape
            for name, info in source.items()
            if (module := name.removesuffix(".weight")) != name and len(info.shape) == 2
            if info.dtype == "F32" and (module in linears or is_embedding(module))
        }
        ends = np.cumsum([0, *(shape[0] for shape in matrices.values())]).tolist()
        starts = dict(zip(matrices, ends, strict=False))
        if narrow := [name for name, shape in matrices.items() if shape[1] < 2]:
            raise Computed(f"{narrow[0]} has one column, which says nothing of what is done with it")
        marks, tensors = _marks(ends[-1]), dict[str, torch.Tensor]()
        for name in source:
            if name in matrices:
                (out, width), start = matrices[name], starts[name]
                rows = torch.from_numpy(marks[start : start + out])[:, None].expand(out, width)
                module = name.removesuffix(".weight")
                tensors[name] = rows.T if module in linears and linears[module].transposed else rows
            else:
                tensors[name] = torch.from_numpy(source.read(name).array().copy())
        return cls(source, tensors, marks, starts)

    @cached_property
    def digest(self) -> str:
        """Of all that a graph drawn from it can depend on: names, shapes and values."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}\n".encode())
            if name not in self.starts:
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    @contextmanager
    def loaded_instead(self) -> Iterator[None]:
        """Let every model that transformers loads while it lasts have these tensors, and watch over them."""
        original = transformers.PreTrainedModel.__dict__["from_pretrained"]

        def from_pretrained(cls: Any, path: Any, /, *_: Any, config: Any = None, **options: Any) -> Any:
            config = config if config is not None else cls.config_class.from_pretrained(path, **LOCAL)
            model = original.__func__(
                cls, None, config=config, state_dict=dict(self.tensors), dtype=torch.float32, **LOCAL
            )
            self.check_in(model)
            return model

        transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        try:
            with _Watch():
                yield
        finally:
            transformers.PreTrainedModel.from_pretrained = original

    def check_in(self, model: Any) -> None:
        """Raise Computed unless all parameters lie in memory that the skeleton's tensors have."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}
        for name, parameter in model.named_parameters():
            if parameter.numel() and parameter.untyped_storage().data_ptr() not in own:
                raise Computed(f"{name} isn't as it's stored")

    def take_out(self, graph: ir.Graph) -> dict[str, ComputedWeight]:
        """Take the value of each initializer that is made of rows; the weights, by the initializers' names.

        Raises Computed where one has rows' numbers otherwise.
        """
        found: dict[str, ComputedWeight] = {}
        for name, value in graph.initializers.items():
            array = value.const_value.numpy() if value.const_value is not None else np.empty(0)
            weight = self._weight(name, array)
            if weight is not None:
                found[name] = weight
                value.const_value = nothing(name)
            elif self._has_marks(array):
                raise Computed(f"{name} is made of weights, but not of their rows")
        return found

    def _weight(self, name: str, array: npt.NDArray[Any]) -> ComputedWeight | None:
        if array.ndim != 2 or array.dtype != np.float32 or not array.size:
            return None
        for transposed, matrix in ((True, array.T), (False, array)):
            parts = self._parts(matrix[:, 0]) if _is_spread(matrix) else None
            if parts and {self.source.width(f"{part.module}.weight") for part in parts} == {matrix.shape[1]}:
                return ComputedWeight(self.source, parts, transposed, name)
        return None

    def _parts(self, column: Float32) -> tuple[Part, ...] | None:
        rows = self._rows_of(column)
        if rows.min() < 0:
            return None
        names, starts = list(self.starts), np.array(list(self.starts.values()))
        which = np.searchsorted(starts, rows, side="right") - 1
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(which) != 0)) + 1
        parts = []
        for run in np.split(np.arange(len(rows)), cuts):
            number = int(which[run[0]])
            first = int(rows[run[0]] - starts[number])
            parts.append(Part(names[number].removesuffix(".weight"), first, first + len(run)))
        return put_together(parts)

    @cached_property
    def _order(self) -> Int64:
        return np.argsort(self.marks)

    def _rows_of(self, marks: Float32) -> Int64:
        """The number of the row that each mark stands for, of all matrices; -1 for one that is no row's."""
        order = self._order
        places = np.minimum(np.searchsorted(self.marks, marks, sorter=order), len(order) - 1)
        rows = order[places]
        return np.where(self.marks[rows] == marks, rows, -1).astype(np.int64)

    def _has_marks(self, array: npt.NDArray[Any]) -> bool:
        """Whether a tensor is likely to hold numbers of rows: a hundredth of any floats look like one."""
        if array.dtype != np.float32 or array.ndim < 2 or not len(self.marks):
            return False
        sample = array.reshape(-1)[:: max(1, array.size // _SAMPLE)]
        return bool(np.mean(self._rows_of(sample) >= 0) > 0.5)


def _marks(count: int) -> Float32:
    """Different numbers, one for each row, in no order: those of one seed."""
    if count > _MOST_ROWS:
        raise Computed(f"its matrices have {count} rows")
    low, high = np.array([_LOWEST, _HIGHEST], np.float32).view(np.int32).tolist()
    random = np.random.default_rng(_SEED)
    drawn = np.unique(random.integers(low, high, count + count // 4 + 64, np.int32))
    return random.permutation(drawn)[:count].view(np.float32)


def _is_spread(matrix: npt.NDArray[Any]) -> bool:
    """Whether every row of a matrix repeats one number."""
    return matrix.shape[1] == 1 or matrix.strides[1] == 0 or bool((matrix == matrix[:, :1]).all())


def _is_expanded(tensor: object) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.ndim >= 2
        and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    )


class _Watch(TorchFunctionMode):
    """Lets rows be moved about without making room for them, and raises Computed for all else."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        given = [leaf for leaf in pytree.tree_leaves((args, options)) if _is_expanded(leaf)]
        if not given:
            return func(*args, **options)
        if func in (torch.cat, torch.concat, torch.concatenate):
            return _cat(*args, **options)
        if func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone):
            return args[0]
        result = func(*args, **options)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(leaf.untyped_storage().data_ptr() not in _storages(given) for leaf in made):
            raise Computed(f"{getattr(func, '__name__', func)} of a weight")
        return result


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0, **_: Any) -> torch.Tensor:
    """Matrices below each other, the rows' numbers once; dim: 0 or what counts as 0."""
    widths = {tensor.shape[-1] for tensor in tensors}
    narrow = [tensor[:, :1] for tensor in tensors if tensor.ndim == 2 and tensor.stride(1) == 0]
    if dim not in (0, -2) or len(widths) > 1 or len(narrow) < len(tensors):
        raise Computed("cat of weights")
    return torch.cat(narrow).expand(-1, widths.pop())
