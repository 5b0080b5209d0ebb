"""The schemes of compressed-tensors: which layers a config quantizes how, and the presets that can be
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from vera_edge.errors import CheckpointError, FormatError, PlanError
from vera_edge.formats import checks
from vera_edge.name_pattern import NamePattern

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_MOST_PATTERNS = 256  # of a config group
_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """How weights are stored. group_size: inputs with one scale, None but for groups; block: likewise."""

    format: str
    kind: str  # "int" or "float"
    bits: int
    strategy: str
    symmetric: bool = True
    group_size: int | None = None
    block: list[int] | None = None

    @property
    def packed(self) -> bool:
        return self.format == "pack-quantized"

    @property
    def described(self) -> str:
        size = {"group": f" of {self.group_size}", "block": f" of {self.block}"}.get(self.strategy, "")
        return f"its scheme ({self.kind}{self.bits}, one scale for each {self.strategy}{size})"

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        if self.strategy == "block" and self.block:
            return (self.block[0], self.block[1])
        return {
            "tensor": shape,
            "channel": (1, shape[1]),
            "group": (1, self.group_size or shape[1]),
        }[self.strategy]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Targets:
    """A config group: the layers it names ("Linear", a module's name, or "re:" and a pattern)."""

    targets: tuple[str, ...]
    scheme: Scheme

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.targets)

    @cached_property
    def _patterns(self) -> list[NamePattern]:
        return [_pattern(target) for target in self.targets if target.startswith("re:")]

    def rank(self, module: str) -> int:
        """How closely it names a module: 3 by name, 2 by pattern, 1 by class, 0 not at all."""
        if module in self._names or module.rsplit(".", 1)[-1] in self._names:
            return 3
        try:
            named = any(pattern.matches(module) for pattern in self._patterns)
        except ValueError as cause:
            raise FormatError(
                f"config.json names layers by a pattern, and {cause}; copy the base again"
            ) from None
        return 2 if named else int("Linear" in self._names)


def _pattern(target: str) -> NamePattern:
    try:
        return NamePattern(target[3:])
    except ValueError as cause:
        raise FormatError(
            f"config.json names layers by {target[:80]!r}, which is no pattern that vera-edge takes: {cause}"
        ) from None


def read(found: Mapping[str, Any]) -> Sequence[Targets]:
    """The config groups of a quantization_config. Raises FormatError on what isn't known."""
    if found.get("quantization_status", "compressed") != "compressed":
        raise FormatError(
            f"this compressed-tensors model is {found['quantization_status']!r}, weights not yet rounded; "
            "save it compressed"
        )
    if found.get("transform_config"):
        raise FormatError("this compressed-tensors model transforms its weights (transform_config); untested")
    sparsity = found.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise FormatError(f"compressed-tensors with sparsity {sparsity.get('format')!r} isn't known")
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not (groups or found.get("kv_cache_scheme")):
        raise FormatError(
            "quantization_config has no config_groups, where compressed-tensors keeps its schemes"
        )
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise FormatError(f"config group {name} of compressed-tensors has no targets")
    return [
        _targets(name, group, found.get("format"))
        for name, group in groups.items()
        if group.get("weights") is not None
    ]


def notes(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What a quantization_config rounds beside the weights, which isn't done here; a sentence for each."""
    groups = found.get("config_groups")
    told = []
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if group.get("weights") is None and (
            group.get("input_activations") or group.get("output_activations")
        ):
            targets = ", ".join(str(target) for target in group["targets"])
            told.append(
                f"config group {name} rounds what {targets} computes while the base runs, and no weights; "
                "that isn't reproduced"
            )
    if found.get("kv_cache_scheme"):
        told.append("the base rounds its KV cache while it runs (kv_cache_scheme); that isn't reproduced")
    return tuple(told)


def _targets(name: str, group: Mapping[str, Any], default_format: Any) -> Targets:
    weights, targets = group["weights"], group["targets"]
    if not isinstance(weights, Mapping):
        raise FormatError(
            f"config group {name} of compressed-tensors gives {str(weights)[:80]!r} as its weights"
        )
    block = weights.get("block_structure")
    scheme = Scheme(
        format=str(group.get("format") or default_format),
        kind=str(weights.get("type", "int")),
        bits=weights.get("num_bits", 8),
        strategy=str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")),
        symmetric=bool(weights.get("symmetric", True)),
        group_size=weights.get("group_size"),
        block=list(block) if isinstance(block, list) else None,
    )
    _check(scheme, name)
    if sum(str(target).startswith("re:") for target in targets) > _MOST_PATTERNS:
        raise FormatError(f"config group {name} has over {_MOST_PATTERNS} patterns of names, more than any")
    return Targets(tuple(str(target) for target in targets), scheme)


def _check(scheme: Scheme, name: str) -> None:
    widths = {"int": (4, 8) if scheme.packed else (8,), "float": (8,)}.get(scheme.kind, ())
    sound = (
        scheme.format in _FORMATS
        and checks.whole(scheme.bits, widths)
        and scheme.strategy in _STRATEGIES
        and not (scheme.packed and scheme.kind == "float")
        and (scheme.kind == "int" or scheme.symmetric)
    )
    if not sound:
        raise FormatError(
            f"config group {name}: {scheme.format} with {scheme.kind}{scheme.bits} weights, one scale for "
            f"each {scheme.strategy}, isn't known; vera-edge reads int4 and int8 packed, int8, and FP8"
        )
    block = scheme.block or []
    if scheme.strategy == "block" and (
        scheme.kind == "int" or len(block) != 2 or any(type(n) is not int or n < 1 for n in block)
    ):
        raise FormatError(
            f"config group {name}: blocks of {scheme.block} aren't known for {scheme.kind} weights"
        )


def scheme_of(module: str, groups: Sequence[Targets]) -> Scheme:
    """The scheme of a quantized module: of the group that names it most closely."""
    best = max(groups, key=lambda group: group.rank(module), default=None)
    if best is None or not best.rank(module):
        raise CheckpointError(f"{module} is stored quantized, but no config group of config.json names it")
    return best.scheme


_INT8_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_FP8_TOKENS = {**_INT8_TOKENS, "type": "float"}
# name -> scheme and what activations are rounded to when the model runs
_PRESETS: Mapping[str, tuple[Scheme, Mapping[str, Any] | None]] = {
    "W4A16": (Scheme("pack-quantized", "int", 4, "group"), None),
    "W4A16_ASYM": (Scheme("pack-quantized", "int", 4, "group", symmetric=False), None),
    "W8A16": (Scheme("pack-quantized", "int", 8, "group"), None),
    "W8A8": (Scheme("int-quantized", "int", 8, "channel"), _INT8_TOKENS),
    "FP8_DYNAMIC": (Scheme("float-quantized", "float", 8, "channel"), _FP8_TOKENS),
}


def preset(options: Mapping[str, Any]) -> Scheme:
    """The scheme of a preset with its group size. Raises PlanError when there is none of that name."""
    if options["preset"] not in tuple(_PRESETS):  # a list can't be looked up
        raise PlanError(f"compressed-tensors is written as {', '.join(_PRESETS)}, not {options['preset']!r}")
    scheme = _PRESETS[options["preset"]][0]
    if scheme.strategy != "group":
        return scheme
    return Scheme(**{**scheme.to_dict(), "group_size": options["group_size"]})


def preset_of(scheme: Scheme) -> str | None:
    """The preset that stores weights as `scheme` does, None when there is none."""
    for name, (known, _) in _PRESETS.items():
        same = (known.format, known.kind, known.bits, known.strategy, known.symmetric)
        if same == (scheme.format, scheme.kind, scheme.bits, scheme.strategy, scheme.symmetric):
            return name
    return None


def quantization_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config of config.json for a preset on all linears but the head."""
    scheme, activations = preset(options), _PRESETS[options["preset"]][1]
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": dict(activations) if activations else None,
        "output_activations": None,
        "format": scheme.format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
