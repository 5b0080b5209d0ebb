"""What changed from one bundle to the next, or from one adapter to the next: by field, file and layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vera_edge.adapters import reading as adapters
from vera_edge.adapters.adapter import Adapter
from vera_edge.arrays import Float32
from vera_edge.bundle import chunks
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import BundleError
from vera_edge.storage.json_text import TABLE, read_json
from vera_edge.trained import alignment

_FIELDS = (
    *("kind", "mode", "weights", "options", "exact", "model", "default_adapter", "golden"),
    *("limits", "requires", "cpu", "tools"),
)
_DRIFT = "evidence/drift.json"


@dataclass(frozen=True)
class Difference:
    """What differs. `facts`: name -> (old, new). `layers`: module -> |new - old| / |old| of its vectors.

    `files`: name -> (old bytes, new bytes), None where it isn't. `transfer`: bytes that a device with the old
    one lacks, None when that isn't known.
    """

    facts: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    files: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    transfer: int | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.facts or self.files or self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The difference as a JSON object."""
        return {
            "same": self.same,
            "facts": {name: list(pair) for name, pair in self.facts.items()},
            "files": {name: list(pair) for name, pair in self.files.items()},
            "layers": dict(self.layers),
            "transfer": self.transfer,
        }

    def lines(self) -> Iterator[str]:
        """The difference for a person to read."""
        if self.same:
            yield "nothing differs"
        for name, (old, new) in self.facts.items():
            yield f"{name}: {_short(old)} -> {_short(new)}"
        for name, (before, after) in self.files.items():
            if before is None or after is None:
                yield f"{'added' if before is None else 'removed'} {name} ({before or after} bytes)"
            else:
                yield f"changed {name} ({before} -> {after} bytes)"
        ordered = sorted(self.layers.items(), key=lambda item: -item[1])
        for module, share in ordered[:10]:
            yield f"vectors of {module} changed by {share:.2%} of their norm"
        if len(ordered) > 10:
            yield f"and those of {len(ordered) - 10} more layers by less"
        if self.transfer is not None:
            yield f"a device that has the old one needs {self.transfer} bytes"


def compare_bundles(old_folder: Path, new_folder: Path) -> Difference:
    """Compare two bundles by their manifests and evidence. Raises BundleError when one isn't sound."""
    old, new = bundle.read(old_folder), bundle.read(new_folder)
    facts = {name: (getattr(old, name), getattr(new, name)) for name in _FIELDS}
    facts |= {
        "base": (old.base["digest"], new.base["digest"]),
        "projections": (_digest(old.projection), _digest(new.projection)),
        "adapters": (_digests(old), _digests(new)),
    }
    facts |= _drift(old, new) | _steps(old, new)
    names = sorted(old.files.keys() | new.files.keys())
    files = {
        name: (_size(old, name), _size(new, name))
        for name in names
        if old.files.get(name) != new.files.get(name)
    }
    changed = {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    return Difference(changed, files, {}, _transfer(old, new))


def compare_adapters(old_folder: Path, new_folder: Path) -> Difference:
    """Compare two PEFT folders, layers that have a prefix in one of them included.

    Raises AdapterError when one can't be read.
    """
    old, new = adapters.read(old_folder), adapters.read(new_folder)
    old = alignment.align_names(old, new.vectors, {})
    facts = {
        name: (getattr(old, name), getattr(new, name))
        for name in ("method", "rank", "seed", "base_name", "peft_version")
    }
    facts["layers"] = (len(old.vectors), len(new.vectors))
    facts["layers that only one has"] = (
        sorted(old.vectors.keys() - new.vectors.keys()),
        sorted(new.vectors.keys() - old.vectors.keys()),
    )
    facts["other tensors"] = (
        sorted([*old.biases, *old.modules_to_save, *old.embeddings]),
        sorted([*new.biases, *new.modules_to_save, *new.embeddings]),
    )
    layers = {}
    one, other = _trained(old), _trained(new)
    for module in sorted(one.keys() & other.keys()):
        before, after = one[module], other[module]
        share = max(
            _share(before[name], after[name]) if name in before and name in after else 1.0
            for name in before.keys() | after.keys()
        )
        if share > 0:
            layers[module] = share
    return Difference({name: pair for name, pair in facts.items() if pair[0] != pair[1]}, {}, layers)


def _trained(adapter: Adapter) -> dict[str, Mapping[str, Float32]]:
    """What was trained, by module: linears, and tables of embeddings."""
    found = {module: change.arrays for module, change in adapter.vectors.items()}
    return found | {module: change.arrays for module, change in adapter.embeddings.items()}


def _share(old: Float32, new: Float32) -> float:
    """|new - old| / |old|; 1 where it can't be compared."""
    if old.shape != new.shape:
        return 1.0
    norm = float(np.linalg.norm(old))
    change = float(np.linalg.norm(new - old))
    return change / norm if norm > 0 else float(change > 0)


def _digest(value: Mapping[str, Any] | None) -> Any:
    return None if value is None else value["digest"]


def _digests(manifest: Manifest) -> dict[str, str]:
    return {name: entry["digest"] for name, entry in manifest.adapters.items()}


def _size(manifest: Manifest, name: str) -> int | None:
    entry = manifest.files.get(name)
    return None if entry is None else entry.size


def _drift(old: Manifest, new: Manifest) -> dict[str, tuple[Any, Any]]:
    """The figures that gates look at, where both bundles carry their evidence."""
    if _DRIFT not in old.files or _DRIFT not in new.files:
        return {}
    try:
        values = [read_json(one.path(_DRIFT), BundleError, TABLE) for one in (old, new)]
        kl = [value["fidelity"]["kl"]["mean"]["value"] for value in values]
        top1 = [value["fidelity"]["same_top1"]["value"] for value in values]
    except (BundleError, KeyError, TypeError):
        return {"drift": ("unreadable", "unreadable")}
    return {"mean KL": (kl[0], kl[1]), "top-1 agreement": (top1[0], top1[1])}


def _steps(old: Manifest, new: Manifest) -> dict[str, tuple[Any, Any]]:
    """Layers that are stored in another way."""

    def formats(manifest: Manifest) -> dict[str, Any]:
        steps = (manifest.plan or {}).get("steps") or []
        return {step["module"]: [step["action"], step["result"], step.get("options")] for step in steps}

    before, after = formats(old), formats(new)
    return {f"plan of {module}": (before.get(module), after.get(module)) for module in before | after}


def _transfer(old: Manifest, new: Manifest) -> int | None:
    if chunks.INDEX not in old.files or chunks.INDEX not in new.files:
        return None
    known = {one.sha256 for many in chunks.read_index(old.path(chunks.INDEX)).values() for one in many}
    fresh = [
        one.size
        for many in chunks.read_index(new.path(chunks.INDEX)).values()
        for one in many
        if one.sha256 not in known
    ]
    return sum(fresh) + new.files[chunks.INDEX].size + (new.folder / bundle.MANIFEST).stat().st_size


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
