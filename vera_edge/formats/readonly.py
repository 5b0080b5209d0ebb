"""What a format that is only read answers when it is asked to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from vera_edge.arrays import Float32
from vera_edge.errors import PlanError
from vera_edge.formats.weight import Layout, StoredLinear, Weight


class ReadOnly:
    """The writing half of a `WeightFormat` that raises PlanError."""

    name: str

    def options_of(self, linear: StoredLinear) -> Mapping[str, Any]:
        return dict(linear.params)

    def options(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        self._refuse()

    def layout(self, shape: tuple[int, int], options: Mapping[str, Any]) -> Layout:
        self._refuse()

    def quantize(self, weight: Float32, options: Mapping[str, Any]) -> Weight:
        self._refuse()

    def quantization_config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        return None

    def _refuse(self) -> NoReturn:
        raise PlanError(
            f"vera-edge reads {self.name} and doesn't write it; choose another format, such as bf16"
        )
