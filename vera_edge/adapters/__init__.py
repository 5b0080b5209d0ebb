"""A PEFT adapter's folder alone: its config and vectors, checked, and VeRA's projections from the seed.

Comes in: the folder. Gives: an `Adapter`, and A and B bit for bit as PEFT drew them. Numpy alone; what
needs the base is in `trained`.
"""
