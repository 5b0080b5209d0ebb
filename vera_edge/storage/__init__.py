"""Files on disk: canonical JSON, digests, atomic output; safetensors on demand, in one file or by an index,
and written.

Comes in: a path from anybody, so nothing read is trusted. Gives: bytes, tensors and settings that were
checked. Knows nothing of adapters or models.
"""
