"""LoRA and DoRA: a pair of small matrices for each layer, and a magnitude where DoRA trained one.

`W + scale B A` with A (r, in), B (out, r) and scale = alpha / r, or alpha / sqrt(r) with rsLoRA; DoRA's rows
are then brought to the length that was trained (Liu et al., ICML 2024), `m (W + scale B A) / |W + scale B A|`
row by row, as `DoraLinearLayer` of peft/tuners/lora/dora.py has it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vera_edge.adapters import embeddings
from vera_edge.adapters.adapter import LORA, Adapter, LayerChange
from vera_edge.adapters.folder import UNGATHERED, AdapterFolder
from vera_edge.adapters.method import Method
from vera_edge.adapters.projection import MAX_SIDE
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError
from vera_edge.name_pattern import NamePattern
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json

_A, _B, _BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_VELORA = "lora_velora_embed"  # what VeLoRA keeps activations by as it trains; no output has a part of it
_TABLES = (embeddings.A, embeddings.B, embeddings.ROWS)
_OWN = frozenset({"lora_A", "lora_B", *_TABLES, _MAGNITUDE, _VELORA})
_BIASES = ("all", "lora_only")
# Initialisations that leave the base what it was.
_HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that make another layer of it, or adapt what isn't a linear layer, by what PEFT calls them.
_OTHER_LAYERS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("target_parameters", "use_bdlora", "use_qalora"),
)
# Settings that say how it was trained or where, and nothing of what it computes.
_KNOWN = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
        *("fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size"),
        *("runtime_config", "lora_bias", "velora_config", "trainable_token_indices", "ensure_weight_tying"),
    }
)


@dataclass(frozen=True, eq=False)
class LoraPair(LayerChange):
    """What LoRA trained for one linear layer: `a` (r, in), `b` (out, r), float32, and the scale of `b a`.

    magnitude: DoRA's (out,). bias: of the second product (out,), before the scale.
    """

    a: Float32
    b: Float32
    scale: float
    magnitude: Float32 | None = None
    bias: Float32 | None = None

    @property
    def arrays(self) -> Mapping[str, Float32]:
        """A, B, and what there is of a magnitude and a bias."""
        found = {_A: self.a, _B: self.b, _MAGNITUDE: self.magnitude, _BIAS: self.bias}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def is_zero(self) -> bool:
        """Whether B was never trained, and no magnitude."""
        return self.magnitude is None and not (self.scale and self.b.any() and self.a.any())

    @property
    def adds(self) -> bool:
        """Whether it is no DoRA."""
        return self.magnitude is None

    @property
    def rank(self) -> int:
        """The rank of this layer's pair."""
        return len(self.a)

    @property
    def out_features(self) -> int:
        """The layer's outputs."""
        return len(self.b)

    @property
    def in_features(self) -> int:
        """The layer's inputs."""
        return int(self.a.shape[1])


@dataclass
class _Settings:
    """What the config says of ranks and scales, by module."""

    folder: AdapterFolder
    rank: int = field(init=False)
    alpha: float = field(init=False)
    ranks: dict[str, int] = field(init=False)
    alphas: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        config = self.folder.config
        self.rank, self.alpha = self._rank("r", config.get("r")), self._number("lora_alpha")
        self.ranks = {name: self._rank(name, rank) for name, rank in self._pattern("rank_pattern").items()}
        self.alphas = {}
        for name, alpha in self._pattern("alpha_pattern").items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise self.folder.refuse(f"alpha_pattern gives {name} {alpha!r} where a number belongs")
            self.alphas[name] = float(alpha)

    def rank_of(self, module: str) -> int:
        return self._matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), self._matching(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.folder.config.get("use_rslora") else alpha / rank

    def _matching(self, values: Mapping[str, Any], module: str, otherwise: Any) -> Any:
        """The value of the first pattern that the end of a module's name matches (peft's get_pattern_key)."""
        for pattern, value in values.items():
            if module == pattern or module.endswith(f".{pattern}"):
                return value
            try:
                if NamePattern(rf"(.*\.)?({pattern})$").matches(module):
                    return value
            except ValueError as cause:
                raise self.folder.refuse(f"the pattern {pattern!r} can't be read: {cause}") from None
        return otherwise

    def _pattern(self, key: str) -> Mapping[str, Any]:
        value = self.folder.config.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.folder.refuse(f"{key} is {value!r} where values by module belong")
        return value

    def _rank(self, what: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= MAX_SIDE:
            raise self.folder.refuse(f"gives rank {what} = {value!r}; it must be from 1 to {MAX_SIDE}")
        return value

    def _number(self, key: str) -> float:
        value = self.folder.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.folder.refuse(f"{key} is {value!r} where a number belongs")
        return float(value)


def _read(folder: AdapterFolder) -> Adapter:
    _check_settings(folder)
    settings = _Settings(folder)
    found: dict[str, dict[str, Float32]] = {}
    own = set[str]()
    for name in folder.tensors:
        if (place := _place(name)) is not None:
            module, end = place
            own.add(name)
            if end == _VELORA:
                continue
            found.setdefault(module, {})[end] = folder.floats(name, 1 if end in (_BIAS, _MAGNITUDE) else 2)
    others = folder.others(own.__contains__, "LoRA", _BIASES)
    tables = [module for module, parts in sorted(found.items()) if not parts.keys().isdisjoint(_TABLES)]
    changes = {module: _of_table(module, found.pop(module), settings) for module in tables}
    embeddings.check_all_there(folder, changes)
    vectors = {module: _pair(module, parts, settings) for module, parts in sorted(found.items())}
    if not vectors:
        raise _nothing_for_linears(folder, changes)
    return Adapter(
        path=folder.path,
        name=folder.name,
        base_name=folder.text_or_none("base_model_name_or_path"),
        rank=max(pair.rank for pair in vectors.values()),
        embeddings=changes,
        seed=0,
        vectors=vectors,
        saved=None,
        biases=others.biases,
        modules_to_save=others.modules_to_save,
        config=folder.config,
        peft_version=folder.text_or_none("peft_version"),
        digest=_digest(folder, vectors, changes),
        notes=folder.notes,
        method=METHOD.peft_type,
    )


def _nothing_for_linears(folder: AdapterFolder, tables: Collection[str]) -> AdapterError:
    if tables:
        return AdapterError(
            f"{folder.path} trains {min(tables)} and no linear layer; vera-edge takes embeddings beside those"
        )
    return AdapterError(
        f"{folder.path} holds no LoRA matrices; it was saved before any layer was adapted, or {UNGATHERED}"
    )


def _digest(
    folder: AdapterFolder,
    vectors: Mapping[str, LoraPair],
    tables: Mapping[str, embeddings.EmbeddingChange],
) -> str:
    scales = [[module, pair.scale] for module, pair in vectors.items()]
    facts: list[Any] = [METHOD.peft_type, scales, folder.config.get("bias", "none"), folder.digest]
    if tables:
        facts.append([[module, change.setting] for module, change in tables.items()])
    return sha256_bytes(canonical_json(facts))


_DOES = "adds scale B A to the weight, with a pair of small matrices for each layer"
METHOD = Method(LORA, "LoRA", _OWN.__contains__, _read, branches=True, does=_DOES)


def _place(name: str) -> tuple[str, str] | None:
    """A tensor's module, and the end of its name from LoRA's own part on; None where it isn't LoRA's."""
    parts = name.split(".")
    at = next((number for number, part in enumerate(parts) if part in _OWN), None)
    if at is None:
        return None
    end = ".".join(parts[at:])
    known = (_A, _B, _BIAS, _MAGNITUDE, _VELORA, *_TABLES)
    end = end.removesuffix(".weight") if end.startswith(_MAGNITUDE) else end
    return (embeddings.module_of(".".join(parts[:at])), end) if end in known else None


def _of_table(module: str, parts: Mapping[str, Float32], settings: _Settings) -> embeddings.EmbeddingChange:
    folder = settings.folder
    if embeddings.ROWS in parts:
        if len(parts) > 1:
            raise AdapterError(
                f"{folder.path} trains rows of {module} and adapts it by a pair; one of the two"
            )
        return embeddings.rows_of(folder, module, parts[embeddings.ROWS])
    return embeddings.pair_of(folder, module, parts, settings.rank_of(module), settings.scale_of(module))


def _pair(module: str, parts: Mapping[str, Float32], settings: _Settings) -> LoraPair:
    path = settings.folder.path
    for name, other in ((_A, _B), (_B, _A)):
        if name not in parts:
            raise AdapterError(f"{path} holds no {name} for {module}, only {min(parts)}; {other} needs both")
    a, b, rank = parts[_A], parts[_B], settings.rank_of(module)
    if len(a) != rank or b.shape[1] != rank:
        raise AdapterError(
            f"the matrices of {module} in {path} have shapes {list(a.shape)} and {list(b.shape)}, and its "
            f"config gives them rank {rank}"
        )
    for name in (_MAGNITUDE, _BIAS):
        if name in parts and parts[name].size != len(b):
            raise AdapterError(
                f"{name} of {module} in {path} has {parts[name].size} values for {len(b)} outputs"
            )
    if (_MAGNITUDE in parts) != bool(settings.folder.config.get("use_dora")):
        holds = "holds" if _MAGNITUDE in parts else "holds no"
        raise AdapterError(
            f"{path} {holds} {_MAGNITUDE} of {module}, and its config says use_dora "
            f"{bool(settings.folder.config.get('use_dora'))}; save it again"
        )
    return LoraPair(a, b, settings.scale_of(module), parts.get(_MAGNITUDE), parts.get(_BIAS))


def _check_settings(folder: AdapterFolder) -> None:
    """Raise AdapterError where the config says that it computes something else, or that its base changed."""
    config = folder.config
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{folder.path} was trained from init_lora_weights={start!r}, which took its start out of the "
            "base, so that it doesn't fit the base as it lies here; save it as the difference, with "
            "save_pretrained(path_initial_model_for_weight_conversion=...), or if the base here is the "
            "changed one, as saved when the training began, set init_lora_weights to true in its config"
        )
    if not (start is None or type(start) is bool or start in _HARMLESS):
        raise folder.refuse(f"init_lora_weights is {start!r}, which vera-edge doesn't know")
    for key in _OTHER_LAYERS:
        if config.get(key):
            raise folder.refuse(
                f"{key} is set, which makes the adapter another than LoRA on linear layers; vera-edge "
                "doesn't take it"
            )
    for key, value in config.items():
        if key not in _KNOWN and key not in _OTHER_LAYERS and value not in (None, False, "", [], {}):
            raise folder.refuse(
                f"{key} is {value!r}, a setting that vera-edge doesn't know and that may change what it "
                "computes"
            )
