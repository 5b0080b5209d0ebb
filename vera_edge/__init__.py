"""vera-edge: put a VeRA adapter, and the quantized model it was trained on, onto a small device.

See ARCHITECTURE.md for how the modules follow each other; each imports only from those before it.
"""

__version__ = "0.1.0"
