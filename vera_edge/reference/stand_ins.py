"""Stand-ins for a checkpoint's matrices: tensors of their shapes that take the memory of one number a row.

A model is made of them by transformers' own loading, as of the real ones, so that whatever that does with
names and ties is done. A parameter that is a stand-in, not something computed from some, takes the matrix's
values just before it is needed and gives them back after. Between, it holds NaN: a model that used a matrix
that isn't in its place would say so in every output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Load = Callable[[str], torch.Tensor]
_SEED = 5


class StandIns:
    """Stand-ins for matrices of given names and shapes. load: gives a matrix's float32 values by its name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], load: Load) -> None:
        self._load = load
        self._columns: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            column = torch.full((shape[0], *(1 for _ in shape[1:])), math.nan)
            self._columns[name], self._names[column.data_ptr()] = column, name
            self.tensors[name] = column.expand(shape)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Which matrix a tensor stands for; None for one that holds values of its own."""
        name = self._names.get(tensor.data_ptr())
        if name is None:
            return None
        own = self.tensors[name]
        return name if tensor.shape == own.shape and tensor.stride() == own.stride() else None

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """The values of the matrix that a tensor stands for, read now; another tensor as it is."""
        name = self.name_of(tensor)
        return tensor if name is None else self._load(name)

    def all_in(self, model: nn.Module) -> bool:
        """Whether each matrix of the model is a stand-in, none of them something computed from some."""
        return all(
            self.name_of(parameter.data) is not None
            for parameter in model.parameters()
            if parameter.ndim >= 2 and parameter.numel()
        )

    def fill(self) -> None:
        """Give all stand-ins numbers, the same at each call, which differ from row to row."""
        draw = torch.Generator().manual_seed(_SEED)
        for name, column in self._columns.items():
            width = math.prod(self.tensors[name].shape[1:])
            column.copy_(torch.randn(column.shape, generator=draw) / math.sqrt(width))

    def products(self) -> TorchFunctionMode:
        """While it lasts, linear layers multiply with a stand-in at the cost of one column.

        torch would write the whole matrix out first. Only for passes whose numbers are compared with each
        other: sums come in another order than those of the product.
        """
        return _Products(self)

    @contextmanager
    def poisoned(self, names: Iterable[str]) -> Iterator[None]:
        """Some stand-ins full of NaN, to see what depends on them."""
        kept = {name: self._columns[name].clone() for name in names}
        for name in kept:
            self._columns[name].fill_(math.nan)
        try:
            yield
        finally:
            for name, values in kept.items():
                self._columns[name].copy_(values)

    def empty(self) -> None:
        """NaN in all of them from now on."""
        for column in self._columns.values():
            column.fill_(math.nan)

    def held_by(self, module: nn.Module) -> set[str]:
        """The matrices whose stand-ins are parameters of a module or of its parts."""
        names = (self.name_of(parameter.data) for parameter in module.parameters())
        return {name for name in names if name is not None}

    @contextmanager
    def placed(
        self, parameters: Iterable[nn.Parameter], read: dict[str, torch.Tensor], only: set[str] | None = None
    ) -> Iterator[None]:
        """Parameters with their matrices' values, which are read once as long as `read` keeps them.

        only: names of the matrices that are wanted; None for all.
        """
        changed: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        try:
            for parameter in parameters:
                stand_in = parameter.data
                name = self.name_of(stand_in)
                if name is None or (only is not None and name not in only):
                    continue
                if name not in read:
                    read[name] = self._load(name)
                parameter.data = read[name]
                changed.append((parameter, stand_in, read[name]))
            yield
        finally:
            for parameter, stand_in, _ in changed:
                parameter.data = stand_in


class _Products(TorchFunctionMode):
    def __init__(self, stand_ins: StandIns) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is not nn.functional.linear or len(args) < 2 or self._stand_ins.name_of(args[1]) is None:
            return func(*args, **options)
        x, weight, *rest = args
        bias = rest[0] if rest else options.get("bias")
        # Each row repeats one number, so that its product with x is that number times the sum of x.
        product = x.sum(-1, keepdim=True) * weight[:, 0]
        return product if bias is None else product + bias
