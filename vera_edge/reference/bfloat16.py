"""A model computed in bfloat16, at the price of float32 where the processor has no products of bfloat16.

torch's autocast multiplies in bfloat16 whatever the processor is. One without instructions for it converts
inside of each product: on AVX2 that takes four times as long as float32. There the same is computed by
float32 products of factors that are rounded to bfloat16. Instructions for bfloat16 sum up in float32 as well,
so only the order of a sum is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# How many leading arguments of each function are factors or are added to the product.
_PRODUCTS: Mapping[Callable[..., Any], int] = {
    torch.nn.functional.linear: 3,
    torch.matmul: 2,
    torch.Tensor.matmul: 2,
    torch.Tensor.__matmul__: 2,
    torch.bmm: 2,
    torch.nn.functional.scaled_dot_product_attention: 3,
}


@contextmanager
def in_bfloat16(native: bool | None = None) -> Iterator[None]:
    """Products of torch in bfloat16 on the processor, as autocast has them.

    native: whether the processor's own instructions multiply; None: where it has them.
    """
    with torch.autocast("cpu", torch.bfloat16):
        if _has_products() if native is None else native:
            yield
            return
        with _RoundedProducts():
            yield


@cache
def _has_products() -> bool:
    """Whether the processor multiplies bfloat16; True where torch can't tell, which leaves all to it."""
    told = getattr(torch.cpu, "get_capabilities", None)
    if told is None:
        return True
    return any(has for name, has in told().items() if name.endswith("bf16"))


class _RoundedProducts(TorchFunctionMode):
    """Products of autocast by float32 arithmetic: factors rounded to bfloat16 first, results after."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options, count = dict(kwargs or {}), _PRODUCTS.get(func)
        if count is None:
            return func(*args, **options)
        rounded = [_rounded(one) for one in args[:count]]
        with torch.autocast("cpu", enabled=False):
            found = func(*rounded, *args[count:], **{name: _rounded(one) for name, one in options.items()})
        return found.bfloat16()


def _rounded(value: Any) -> Any:
    """A float tensor's values in bfloat16, as float32; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.bfloat16().float()
