"""soak_serve: what counts as growth, of samples that begin with a server warming up."""

from __future__ import annotations

import pytest

from scripts.soak_serve import growth


def test_warming_up_is_no_growth_and_a_leak_is() -> None:
    warm = [100, 150, 190, 200, *[200] * 12]
    assert growth(warm) == 0
    assert growth([size + 2 * at for at, size in enumerate(warm)]) == pytest.approx(16 / 211)


def test_one_sample_that_stands_out_is_no_growth() -> None:
    assert growth([*[200] * 15, 400]) == 0
