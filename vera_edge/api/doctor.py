"""`vera_edge.doctor`: what is installed here, what this machine can do, and what is missing for what."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from vera_edge import cores

__all__ = ["Diagnosis", "doctor"]

# A requirement as a wheel's metadata has it: onnx>=1.19; extra == "build"
_REQUIREMENT = re.compile(
    r"([A-Za-z0-9._-]+)[^;]*?(?:>=\s*([0-9.]+))?[^;]*(?:;.*extra\s*==\s*['\"](\w+)['\"])?"
)
_INT8 = (
    ({"avx512_vnni", "avx_vnni", "asimddp"}, "int8 products at full speed"),
    ({"avx512bw", "avx512f"}, "int8 products with AVX-512, without VNNI: about half the speed"),
    ({"avx2"}, "int8 products with AVX2: a third to a half of the speed"),
    ({"asimd"}, "int8 products without dot products: slow"),
)


@dataclass(frozen=True)
class Package:
    """A package that vera-edge uses. extra: what brings it, None for the device part.

    needed: the least version. installed: None where it's missing. fault: why it's of no use, None where it's
    sound.
    """

    name: str
    extra: str | None
    needed: str | None
    installed: str | None
    fault: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` saw. packages: all that vera-edge may use. machine: processor, `features` (instruction
    sets), `clips_int8`, cores, memory in bytes, system; `kernels` says in words how int8 runs.

    cores: those this process may use, beside those of the machine; `omp_num_threads` where it's set.
    free_memory: bytes that this process may still take. missing: by extra, what isn't installed or too old.
    advice: by extra, the line that brings it. broken: sentences on what the device part needs and lacks.
    """

    vera_edge: str
    packages: tuple[Package, ...]
    machine: dict[str, Any]
    cores: dict[str, Any]
    free_memory: int | None
    missing: dict[str, list[str]]
    advice: dict[str, str]
    broken: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def doctor() -> Diagnosis:
    """Look at what is installed and at this machine; works where nothing but the device part is.

    Args: none.

    Returns:
        A Diagnosis; `broken` is empty when the device part can do its work. A package of an extra that isn't
        there isn't broken: `missing` and `advice` tell of it.

    Raises:
        Nothing on purpose.

    Example:
        >>> diagnosis = vera_edge.doctor()
        >>> diagnosis.broken, diagnosis.cores["usable"] > 0
        ((), True)
    """
    packages = tuple(sorted(_packages(), key=lambda each: (each.extra is not None, each.extra, each.name)))
    missing: dict[str, list[str]] = {}
    for package in packages:
        if package.extra is not None and package.fault is not None:
            missing.setdefault(package.extra, []).append(package.name)
    broken = [f"{each.name} {each.fault}" for each in packages if each.extra is None and each.fault]
    if not packages:
        broken.append("vera-edge itself isn't installed, so what it needs isn't known; pip install it")
    machine, free = _machine(broken)
    return Diagnosis(
        vera_edge=_version("vera-edge") or "not installed",
        packages=packages,
        machine=machine,
        cores={
            "usable": cores.available_cores(),
            "machine": os.cpu_count() or 1,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        free_memory=free,
        missing=missing,
        advice={extra: f"pip install 'vera-edge[{extra}]'" for extra in missing},
        broken=tuple(broken),
    )


def _packages() -> Iterator[Package]:
    """What the installed wheel's metadata lists, but for the extras that only development needs."""
    try:
        lines = requires("vera-edge") or ()
    except PackageNotFoundError:  # a checkout that runs where it lies
        return
    for line in lines:
        matched = _REQUIREMENT.fullmatch(line.strip())
        if matched is None or matched[3] in ("docs", "package", "test", "dev"):
            continue
        name, needed, extra = matched[1], matched[2], matched[3]
        installed = _version(name)
        yield Package(name, extra, needed, installed, _fault(name, needed, installed, extra))


def _fault(name: str, needed: str | None, installed: str | None, extra: str | None) -> str | None:
    if installed is None:
        return "isn't installed"
    if needed is not None and _numbers(installed) < _numbers(needed):
        return f"is {installed}, and {needed} or newer is needed"
    if extra is not None:  # importing torch takes seconds
        return None
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as cause:  # a library for another processor or another libc, say
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        return f"{installed} can't be imported ({reason})"
    return None


def _machine(broken: list[str]) -> tuple[dict[str, Any], int | None]:
    """What the runtime's own look at this machine gives; adds to `broken` where it fails."""
    try:
        from vera_edge.device.check import hardware
        from vera_edge.memory import free_memory

        machine = hardware.hardware_info()
    except Exception as cause:  # onnxruntime's classes share no base but Exception
        if not broken:
            broken.append(f"ONNX Runtime doesn't run here: {cause}")
        return {}, None
    features = set(machine["features"])
    machine["kernels"] = next((words for sets, words in _INT8 if sets & features), "int8 products unknown")
    if machine["clips_int8"]:
        machine["kernels"] += "; sums of uint8 and int8 clip, which vera-edge rounds and runs around"
    return machine, free_memory()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])
