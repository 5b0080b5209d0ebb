"""Energy of the processor packages, where Linux lets this process read Intel's and AMD's counters (RAPL).

The counters are of whole packages: what else the machine does is in them. Most systems let only root read
them.
Source: the Linux kernel's Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts joules from when it is made, for less time than a counter takes to wrap around."""

    def __init__(self, root: Path = _ROOT) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:1 a part of it, counted there already.
        zones = (zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self._begun = {zone: energy for zone in zones if (energy := _number(zone / "energy_uj")) is not None}

    def joules(self) -> float | None:
        """Joules since the meter was made; None where no counter can be read."""
        total = 0
        for zone, begun in self._begun.items():
            now, top = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
            if now is None or (now < begun and top is None):
                return None
            total += now - begun if now >= begun else now - begun + (top or 0)
        return total / 1e6 if self._begun else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
