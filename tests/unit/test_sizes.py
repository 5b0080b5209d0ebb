"""Sizes as people write them."""

from __future__ import annotations

import pytest

from vera_edge.errors import PlanError
from vera_edge.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("90MB", 90_000_000),
        ("90 mib", 90 << 20),
        ("1.5GiB", 3 << 29),
        (".5kB", 500),
        ("2.kb", 2000),
        ("123", 123),
        (" 7b ", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "1.2.3MB", "-1", "1TB", "nan", "1e9", "90 M", "٣MB x", "inf", "9" * 400 + "GB"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(PlanError, match="isn't a size; write it as"):
        parse_size(text)
