"""What this device is, and how much memory this process takes, as far as the system tells."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vera_edge.cores import available_cores
from vera_edge.device.runtime.int8_products import processor_clips

# Instruction sets that ONNX Runtime's kernels choose by, as Linux spells them on x86-64 and aarch64.
_X86 = {"avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni"}
_FEATURES = (
    _X86 | {"avx512_bf16", "amx_int8"} | {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"}
)
_TOOLS = ("vera-edge", "onnxruntime", "numpy", "tokenizers", "jinja2")


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


def rss() -> int | None:
    """Bytes of physical memory this process holds now; None where the system doesn't tell."""
    return _status("VmRSS")


def peak_rss() -> int | None:
    """The most bytes of physical memory this process has held; None where the system doesn't tell."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> int | None:
    """Bytes that this process may still take, by what the system, its control group and its limits say."""
    found = [value for value in (_available(), _left_in_group(), _left_to_map()) if value is not None]
    return min(found, default=None)


def _available() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Within the limit of this process's own control group (version 2)."""
    for line in _read("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            folder = root / line[3:].lstrip("/")
            limit, held = _read(str(folder / "memory.max")), _read(str(folder / "memory.current"))
            if limit.strip().isdigit() and held.strip().isdigit():
                return max(0, int(limit) - int(held))
    return None


def _left_to_map() -> int | None:
    """Within RLIMIT_AS."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, held = resource.getrlimit(resource.RLIMIT_AS)[0], _status("VmSize")
    return None if limit == resource.RLIM_INFINITY or held is None else max(0, limit - held)


def _status(key: str) -> int | None:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> tuple[str, list[str]]:
    """The processor's name and the instruction sets that matter here."""
    found: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
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
