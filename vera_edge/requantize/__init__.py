"""Requantization that loses less than rounding: from a float32 weight to codes on a format's grid.

    grids     what codes and scales a format can store (NF4, FP4, LLM.int8 rows, integer blocks), and `Codes`
    rtn       scales from each block's range, codes to nearest: what other tools do
    search    scales that minimise the error weighted by how much each input matters
    hqq       scales and zero points by half-quadratic splitting, no activations needed
    gptq      codes that make up for each other's errors, on scales that are given
    super_blocks  llama.cpp's types with offsets, and those whose scales have a scale
    refit     scales that are best for given codes, for a whole row at once
    piece     some rows on their way through those two
    kernels   their loops, and those of search, compiled by numba; normal_kernels: those of refit
    effort    how far they go
    devices   where they compute; torch_gram, torch_piece, torch_kernels: the same in torch, for accelerators
    quantize  the methods as one function, `requantize`
    store     codes of many modules, on disk

The measure is the layer's output error, `tr((W - Q) H (W - Q)^T)` with `H = X^T X / n` over calibration
inputs X: an error in the weight hardly predicts what it does to the model (docs/requantize.md).
Everything works on pieces of rows, by numpy's products and compiled loops, and gives the same bytes whatever
the number of threads.
"""

from __future__ import annotations

from vera_edge.requantize.effort import EFFORTS, Effort
from vera_edge.requantize.gram import Gram, output_error
from vera_edge.requantize.grids import GGML_GRIDS, Codes, Grid, bnb_grid, int8_rows, int_blocks
from vera_edge.requantize.quantize import CALIBRATED, METHODS, requantize
from vera_edge.requantize.store import CodesFolder

__all__ = [
    "CALIBRATED",
    "EFFORTS",
    "GGML_GRIDS",
    "METHODS",
    "Codes",
    "CodesFolder",
    "Effort",
    "Gram",
    "Grid",
    "bnb_grid",
    "int8_rows",
    "int_blocks",
    "output_error",
    "requantize",
]
