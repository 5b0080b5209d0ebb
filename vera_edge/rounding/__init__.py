"""A whole model's weights onto the grids of a plan, layer by layer, calibrated on text.

Comes in: a plan, a base and adapters. Gives: codes for a merge or an export. One weight onto one grid is
`requantize`'s.
"""
