"""The methods whose weights PEFT's own layers make, one linear at a time: kept as PEFT saves them.

Here is only how their folders are read; what their tensors mean is PEFT's (see `trained.peft_linear`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class PeftTensors(LayerChange):
    """What a method trained for one linear layer, by the ends of PEFT's names; shape: (out, in), if known."""

    raw: Mapping[str, RawTensor]
    shape: tuple[int, int] | None = None

    @property
    def arrays(self) -> Mapping[str, Float32]:
        """The trained values; integers among them, which say where they belong, as floats."""
        return {
            name: raw.float32() if raw.dtype in FLOATS else raw.array().astype("float32")
            for name, raw in self.raw.items()
        }

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


def _method(
    peft_type: str,
    title: str,
    prefix: str,
    biases: tuple[str, ...] = (),
    needs: Mapping[str, str] | None = None,
) -> Method:
    """A method whose tensors' names have parts that begin with `prefix`.

    biases: settings of `bias` that train some. needs: tensors that a seed alone wouldn't tell -> the setting
    that saves them.
    """

    def own(part: str) -> bool:
        return part.startswith(prefix)

    def read(folder: AdapterFolder) -> Adapter:
        return _read(folder, peft_type, title, own, biases, needs or {})

    return Method(peft_type, title, own, read)


def _read(
    folder: AdapterFolder,
    peft_type: str,
    title: str,
    own: Callable[[str], bool],
    biases: tuple[str, ...],
    needs: Mapping[str, str],
) -> Adapter:
    layers: dict[str, dict[str, RawTensor]] = {}
    shared: dict[str, RawTensor] = {}
    taken = set[str]()
    for name in folder.tensors:
        parts = name.split(".")
        at = next((number for number, part in enumerate(parts) if own(part)), None)
        if at is None:
            continue
        taken.add(name)
        if name in folder.prefixed and at:
            layers.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = folder.tensors[name]
        else:
            shared[name] = folder.tensors[name]
    held = {name.rpartition(".")[2] for name in taken}
    for name, setting in needs.items():
        if name not in held:
            raise AdapterError(
                f"{folder.path} doesn't hold {name}, which was drawn in a way that depends on the machine "
                f"when the training began; train with {setting}=True, so that it is saved"
            )
    others = folder.others(taken.__contains__, title, biases)
    if not layers:
        raise AdapterError(
            f"{folder.path} holds no {title} values; it was saved before any layer was adapted, or "
            f"{UNGATHERED}"
        )
    rank = folder.config.get("r")
    settings = {key: value for key, value in folder.config.items() if key not in _NOT_COMPUTED}
    decided = json.dumps(_ordered(settings), sort_keys=True)
    return Adapter(
        path=folder.path,
        name=folder.name,
        base_name=folder.text_or_none("base_model_name_or_path"),
        rank=rank if type(rank) is int and rank > 0 else 0,
        seed=0,
        vectors={module: PeftTensors(parts) for module, parts in sorted(layers.items())},
        saved=None,
        biases=others.biases,
        modules_to_save=others.modules_to_save,
        config=folder.config,
        peft_version=folder.text_or_none("peft_version"),
        digest=sha256_bytes(canonical_json([peft_type, decided, folder.digest])),
        notes=folder.notes,
        method=peft_type,
        shared=shared,
    )


def _ordered(value: object) -> object:
    """JSON whose lists of names, which PEFT writes in any order, are in theirs."""
    if isinstance(value, Mapping):
        return {str(key): _ordered(item) for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return [_ordered(item) for item in value] if isinstance(value, list) else value


METHODS = (
    _method("ADALORA", "AdaLoRA", "lora_", ("all", "lora_only")),
    _method("BOFT", "BOFT", "boft_", ("all", "boft_only")),
    _method("C3A", "C3A", "c3a_"),
    _method("DEFT", "DEFT", "deft_"),
    _method("DELORA", "DeLoRA", "delora_"),
    _method("FOURIERFT", "FourierFT", "fourierft_", ("all", "fourier_only")),
    _method("GRALORA", "GraLoRA", "gralora_"),
    _method("HIRA", "HiRA", "hira_", ("all", "hira_only")),
    _method("HRA", "HRA", "hra_", ("all", "hra_only")),
    _method("IA3", "IA3", "ia3_"),
    _method("LOHA", "LoHa", "hada_"),
    _method("LOKR", "LoKr", "lokr_"),
    _method("MISS", "MiSS", "miss_", ("all", "miss_only")),
    _method("OFT", "OFT", "oft_", ("all", "oft_only")),
    _method("PEANUT", "PEANuT", "peanut_"),
    _method("PVERA", "PVeRA", "pvera_", ("all", "pvera_only"), {"pvera_A": "save_projection"}),
    _method("RANDLORA", "RandLoRA", "randlora_", ("all", "randlora_only"), {"randlora_A": "save_projection"}),
    _method("ROAD", "RoAd", "road_"),
    _method("SHIRA", "SHiRA", "shira_"),
    _method("SUPERTUNING", "SuperTuning", "supertuning_"),
    _method("VBLORA", "VB-LoRA", "vblora_", ("all", "vblora_only")),
    _method("WAVEFT", "WaveFT", "waveft_", ("all", "waveft_only")),
)
