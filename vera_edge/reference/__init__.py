"""The model as it was trained, in torch: what everything is measured against.

Comes in: a base, adapters and their projections. Gives: logits, embeddings and classes; what each layer
reads, and the statistics that rounding is calibrated on.
"""
