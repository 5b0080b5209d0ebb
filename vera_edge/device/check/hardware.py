"""What this device is, as far as the system tells."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vera_edge.cores import available_cores
from vera_edge.device.runtime.int8_products import processor_clips
from vera_edge.memory import read

# Instruction sets that ONNX Runtime's kernels choose by, as Linux spells them on x86-64 and aarch64.
_X86 = {"avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni"}
_FEATURES = (
    _X86 | {"avx512_bf16", "amx_int8"} | {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"}
)
_TOOLS = ("vera-edge", "onnxruntime", "llama-cpp-python", "numpy", "tokenizers", "jinja2")


def hardware_info() -> dict[str, Any]:
    """Processor, instruction sets, cores, memory (bytes), system and the versions that take part.

    clips_int8: whether sums of products of uint8 and int8 overflow on it (see int8_products.py).
    """
    model, features = processor()
    return {
        "machine": platform.machine(),
        "processor": model,
        "features": features,
        "clips_int8": processor_clips(),
        "cores": available_cores(),
        "memory": _total_memory(),
        "system": platform.platform(aliased=True, terse=True),
        "python": platform.python_version(),
        "tools": {name: number for name in _TOOLS if (number := _version(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> tuple[str, list[str]]:
    """The processor's name and the instruction sets that matter here."""
    found: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    model = found.get("model name") or found.get("Model")
    if not model and "CPU part" in found:  # many ARM kernels have numbers instead of a name
        model = f"{platform.machine()}, implementer {found.get('CPU implementer')}, part {found['CPU part']}"
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return model or platform.processor() or platform.machine(), sorted(flags & _FEATURES)


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
