"""Compiled loops: numba only where rounding needs it, and wherever its cache can be kept or can't."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROUNDED = """
import numpy as np
from vera_edge.requantize import int_blocks, requantize
weight = np.arange(-64, 64, dtype=np.float32).reshape(2, 64)
codes = requantize(weight, int_blocks(4, 32), "gptq", np.eye(64, dtype=np.float32))
print(np.abs(codes.dequantize() - weight).max() < 5)
"""


def run(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return found.stdout


def test_numba_isn_t_imported_before_it_is_needed() -> None:
    modules = "vera_edge, vera_edge.cli.run, vera_edge.device, vera_edge.requantize, vera_edge.api.export"
    assert run(f"import sys, {modules}; print('numba' in sys.modules)") == "False\n"


def test_rounding_to_nearest_needs_no_numba() -> None:
    code = """
import sys, numpy as np
from vera_edge.requantize import bnb_grid, requantize
requantize(np.ones((2, 64), np.float32), bnb_grid("nf4"), "rtn")
print('numba' in sys.modules)
"""
    assert run(code) == "False\n"


def test_a_place_that_takes_no_cache_only_costs_time() -> None:
    """No locator of numba's finds a place: neither beside the source, nor in the user's cache."""
    code = f"""
from numba.core import caching
caching.CacheImpl._locator_classes = []
{ROUNDED}"""
    assert run(code) == "True\n"


def test_compiled_code_is_kept(tmp_path: Path) -> None:
    assert run(ROUNDED, NUMBA_CACHE_DIR=str(tmp_path)) == "True\n"
    assert list(tmp_path.rglob("kernels.*.nbi"))
