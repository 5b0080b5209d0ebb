"""What tests of formats share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vera_edge.formats import compiled


@pytest.fixture(params=["numpy", "compiled"])
def either_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both the loops of numpy and the compiled ones."""
    if request.param == "compiled":
        assert compiled.start()
    yield
    compiled.stop()
