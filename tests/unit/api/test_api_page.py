"""docs/api.md is made of the docstrings as they are, and has everything that is public."""

from __future__ import annotations

import vera_edge
from scripts.make_api_page import PAGE, page


def test_the_page_is_made_of_the_docstrings() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m scripts.make_api_page"


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [name for name in vera_edge.__all__ if name not in text]
    assert not missing


def test_no_address_of_this_run_is_on_the_page() -> None:
    assert " at 0x" not in page()
