"""The methods whose weights PEFT's own layers make, one linear at a time: kept as PEFT saves them.

Here is only how their folders are read; what their tensors mean is PEFT's (see `trained.peft_linear`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from vera_edge.adapters.adapter import Adapter, LayerChange
from vera_edge.adapters.folder import UNGATHERED, AdapterFolder
from vera_edge.adapters.method import Method
from vera_edge.arrays import Float32
from vera_edge.errors import AdapterError
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json
from vera_edge.storage.tensors import FLOATS, RawTensor

# Settings of the config that say nothing of what an adapter computes.
_NOT_COMPUTED = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
)


IA3 = "IA3"
# Methods whose change of a weight is of low rank and doesn't depend on it, so that it can be had without;
# then all whose change is of low rank.
ADDING = frozenset({"ADALORA", "DELORA", "GRALORA", "LOHA", "MISS", "PVERA", "VBLORA"})
_LOW_RANK = ADDING | {"DEFT", "HRA"}


@dataclass(frozen=True, eq=False)
class PeftTensors(LayerChange):
    """What a method trained for one linear layer, by the ends of PEFT's names; shape: (out, in), if known.

    fixed: names of what was drawn, chosen or measured when the training began.
    """

    raw: Mapping[str, RawTensor]
    shape: tuple[int, int] | None = None
    fixed: frozenset[str] = frozenset()

    @property
    def arrays(self) -> Mapping[str, Float32]:
        """The trained values; integers among them, which say where they belong, as floats."""
        return {
            name: raw.float32() if raw.dtype in FLOATS else raw.array().astype("float32")
            for name, raw in self.raw.items()
        }

    @property
    def trained(self) -> Mapping[str, Float32]:
        """All but what is fixed."""
        return {name: array for name, array in self.arrays.items() if name not in self.fixed}

    @property
    def is_zero(self) -> bool:
        """Never said: PEFT's layer decides."""
        return False

    @property
    def adds(self) -> bool:
        """Never said: PEFT's layer is given the weight."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all values as stored."""
        return sum(raw.data.nbytes for raw in self.raw.values())


@dataclass(frozen=True)
class _Kind:
    """A method whose tensors' names have parts that begin with `prefix`; the first three as in `Method`.

    biases: settings of `bias` that train some. needs: tensors that a seed alone wouldn't tell -> the setting
    that saves them. fixed: see `PeftTensors`.
    """

    peft_type: str
    title: str
    does: str
    prefix: str
    biases: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    @property
    def method(self) -> Method:
        """As the registry has it."""

        def read(folder: AdapterFolder) -> Adapter:
            return _read(folder, self)

        beside = {"branches": self.peft_type == IA3, "low_rank": self.peft_type in _LOW_RANK}
        return Method(self.peft_type, self.title, self.own, read, does=self.does, **beside)

    def own(self, part: str) -> bool:
        """Whether a part of a tensor's name is the method's."""
        return part.startswith(self.prefix)


def _read(folder: AdapterFolder, kind: _Kind) -> Adapter:
    layers: dict[str, dict[str, RawTensor]] = {}
    shared: dict[str, RawTensor] = {}
    taken = set[str]()
    for name in folder.tensors:
        parts = name.split(".")
        at = next((number for number, part in enumerate(parts) if kind.own(part)), None)
        if at is None:
            continue
        taken.add(name)
        if name in folder.prefixed and at:
            layers.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = folder.tensors[name]
        else:
            shared[name] = folder.tensors[name]
    held = {name.rpartition(".")[2] for name in taken}
    for name, setting in kind.needs.items():
        if name not in held:
            raise AdapterError(
                f"{folder.path} doesn't hold {name}, which was drawn in a way that depends on the machine "
                f"when the training began; train with {setting}=True, so that it is saved"
            )
    others = folder.others(taken.__contains__, kind.title, kind.biases)
    if not layers:
        raise AdapterError(
            f"{folder.path} holds no {kind.title} values; it was saved before any layer was adapted, or "
            f"{UNGATHERED}"
        )
    settings = {key: value for key, value in folder.config.items() if key not in _NOT_COMPUTED}
    decided = json.dumps(_ordered(settings), sort_keys=True)
    return Adapter(
        path=folder.path,
        name=folder.name,
        base_name=folder.text_or_none("base_model_name_or_path"),
        rank=_rank(folder, layers),
        seed=0,
        vectors={module: PeftTensors(parts, fixed=kind.fixed) for module, parts in sorted(layers.items())},
        saved=None,
        biases=others.biases,
        modules_to_save=others.modules_to_save,
        config=folder.config,
        peft_version=folder.text_or_none("peft_version"),
        digest=sha256_bytes(canonical_json([kind.peft_type, decided, folder.digest])),
        notes=folder.notes,
        method=kind.peft_type,
        shared=shared,
    )


def _rank(folder: AdapterFolder, layers: Mapping[str, Mapping[str, RawTensor]]) -> int:
    """The config's r; AdaLoRA's says how many are to be left, and its matrices how many there are."""
    rows = [side for parts in layers.values() if "lora_A" in parts for side in parts["lora_A"].shape[:1]]
    rank = max(rows, default=folder.config.get("r"))
    return rank if type(rank) is int and rank > 0 else 0


def _ordered(value: object) -> object:
    """JSON whose lists of names, which PEFT writes in any order, are in theirs."""
    if isinstance(value, Mapping):
        return {str(key): _ordered(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return [_ordered(item) for item in value] if isinstance(value, list) else value


_ADDS = "adds to the weight "
_AT_PLACES = "has trained coefficients at drawn places"
_KINDS = (
    _Kind("ADALORA", "AdaLoRA", _ADDS + "B diag(E) A", "lora_", ("all", "lora_only")),
    _Kind(
        "BOFT",
        "BOFT",
        "turns the weight's inputs by products of orthogonal blocks, and scales its outputs",
        "boft_",
        ("all", "boft_only"),
    ),
    _Kind("C3A", "C3A", _ADDS + "a matrix of circulant blocks", "c3a_"),
    _Kind("DEFT", "DEFT", "takes a subspace out of the weight's outputs and adds a product there", "deft_"),
    _Kind(
        "DELORA",
        "DeLoRA",
        _ADDS + "B A, brought to a trained strength",
        "delora_",
        fixed=frozenset({"delora_w_norm"}),
    ),
    _Kind(
        "FOURIERFT",
        "FourierFT",
        _ADDS + f"a matrix whose Fourier transform {_AT_PLACES}",
        "fourierft_",
        ("all", "fourier_only"),
    ),
    _Kind("GRALORA", "GraLoRA", _ADDS + "a matrix of blocks, each a product of its own", "gralora_"),
    _Kind("HIRA", "HiRA", _ADDS + "itself times B A, value by value", "hira_", ("all", "hira_only")),
    _Kind(
        "HRA",
        "HRA",
        "mirrors the weight's inputs, one trained mirror after the other",
        "hra_",
        ("all", "hra_only"),
    ),
    _Kind(IA3, "IA3", "scales the layer's outputs, of feedforward modules its inputs", "ia3_"),
    _Kind("LOHA", "LoHa", _ADDS + "two products, multiplied value by value", "hada_"),
    _Kind("LOKR", "LoKr", _ADDS + "a Kronecker product", "lokr_"),
    _Kind(
        "MISS", "MiSS", _ADDS + "one small matrix, repeated over its inputs", "miss_", ("all", "miss_only")
    ),
    _Kind("OFT", "OFT", "turns the weight's inputs by orthogonal blocks", "oft_", ("all", "oft_only")),
    _Kind("PEANUT", "PEANuT", _ADDS + "what small networks make of it", "peanut_"),
    _Kind(
        "PVERA",
        "PVeRA",
        _ADDS + "diag(lambda_b) B diag(lambda_d) A, lambda_d being the mean of what was trained",
        "pvera_",
        ("all", "pvera_only"),
        {"pvera_A": "save_projection"},
        frozenset({"pvera_A", "pvera_B"}),
    ),
    _Kind(
        "RANDLORA",
        "RandLoRA",
        _ADDS + "a sum of drawn products, each scaled by trained values",
        "randlora_",
        ("all", "randlora_only"),
        {"randlora_A": "save_projection"},
        frozenset({"randlora_A", "randlora_B"}),
    ),
    _Kind("ROAD", "RoAd", "turns the layer's outputs in pairs, and scales them", "road_"),
    _Kind(
        "SHIRA",
        "SHiRA",
        _ADDS + "trained values at some places",
        "shira_",
        fixed=frozenset({"shira_indices"}),
    ),
    _Kind(
        "SUPERTUNING",
        "SuperTuning",
        _ADDS + "trained values at some places",
        "supertuning_",
        fixed=frozenset({"supertuning_indices"}),
    ),
    _Kind(
        "VBLORA",
        "VB-LoRA",
        _ADDS + "B A, whose parts are mixed of vectors that all layers share",
        "vblora_",
        ("all", "vblora_only"),
    ),
    _Kind(
        "WAVEFT",
        "WaveFT",
        _ADDS + f"a matrix whose wavelet transform {_AT_PLACES}",
        "waveft_",
        ("all", "waveft_only"),
    ),
)
METHODS = tuple(kind.method for kind in _KINDS)
