"""The manifest of a bundle as an object: its fields, what must hold for each, and what names may be.

docs/bundle.md specifies the format, bundle.schema.json beside this file is its JSON Schema. Standard library
only: a device reads it before anything else is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from vera_edge.bundle import consistency
from vera_edge.errors import BundleError, MismatchError, PlanError
from vera_edge.storage import json_schema
from vera_edge.storage.files import safe_join

FORMAT = 1
MANIFEST = "vera_edge.json"
SIGNATURE = "model.sig"  # signs the manifest too, so the manifest can't list it
UNLISTED = frozenset({MANIFEST, SIGNATURE})
KINDS = ("decoder", "encoder")
MODES = ("merged", "branch")
NO_ADAPTER = (
    "none"  # how a command line asks for the base alone, so no name of an adapter that can be swapped
)
VECTOR_DTYPES = ("float32", "float16")
GGUF = ".gguf"  # how a model's file ends that llama.cpp runs, and no ONNX Runtime
VNNI = "vnni"  # what a graph may ask of an x86 processor, see device/runtime/int8_products.py
CPU_NEEDS = (VNNI,)
_MAX_FILES = 10_000
_MAX_SIZE = 1 << 53  # the largest integer every JSON reader keeps exact
_LARGEST_BOUND = 1e300  # of a limit; an integer may be too large for a float
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,3}")

# What a JSON reader hands over; the manifest's free-form records keep this type.
Json: TypeAlias = Any


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its size in bytes and the hex SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ManifestFields:
    """What the exporter knows and the files alone don't tell.

    `weights` is the stored format of most linears ("fp32", "int8", "int4", "nf4"); `plan` has each one's.
    `model` is the ONNX graph, or the GGUF file. `base` holds at least `digest`; `adapters` maps a name to at
    least `file` (an .onnx_adapter or a GGUF LoRA of the bundle, or null once it is merged) and `digest`.
    `default_adapter` is what runs when nothing else is asked for. `projection` is the ProjectionSpec with the
    `digest` of A and B. `limits` are the drift limits that `validate` holds the device to; `golden` is the
    file of golden vectors. `requires` maps a runtime's distribution name to the oldest version that runs the
    graph, `cpu` lists what an x86 processor must have to give the right values ("vnni"), None when that isn't
    recorded.
    `lora_rank` is the rank of LoRA's pairs where side-branches take any; None where they are VeRA's.
    `branches` maps "vectors" (VeRA's), "pairs" (LoRA's), "outputs" and "inputs" (factors) and "biases" (what
    is added to them) to the modules that have inputs of that kind; empty where all have the one that
    `lora_rank` tells.
    `model_version` is what every .onnx_adapter for this graph carries; None when that isn't recorded.
    `trained_names` maps a module of the base to what PEFT calls it, where that's another name.
    `vectors` lists module, start and stop of every piece of lambda_b in the graph's order (see packing.py),
    `vector_dtype` ("float32", "float16") is that of the graph's inputs for them.
    `generated` maps a file that isn't shipped, since others determine it, to its `size`, its `sha256` and how
    it is made: from `projection` (see device/runtime/projections.py), or from the weights in the file that
    its `source` names (see device/runtime/expansion.py). Installing makes it.
    `checked` says on what sequences the float graph was held against the model before it was published; None
    in a bundle of a version that didn't.
    `options` are those of the exporter that the plan doesn't hold, by name: what `head`, `projections` and
    `vectors` are stored as ("fp32", "fp16", "int8", "int4"), and the others that were given. `exact` says
    whether the graph with its adapter beside it holds the very values of the model as trained; None when that
    isn't recorded.
    """

    kind: str
    mode: str
    weights: str
    base: Mapping[str, Json]
    model: str = "onnx/model.onnx"
    adapters: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    default_adapter: str | None = None
    projection: Mapping[str, Json] | None = None
    lora_rank: int | None = None
    branches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    model_version: int | None = None
    trained_names: Mapping[str, str] = field(default_factory=dict)
    vectors: Sequence[tuple[str, int, int]] = ()
    vector_dtype: str = VECTOR_DTYPES[0]
    generated: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    plan: Mapping[str, Json] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    exact: bool | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    golden: str | None = None
    requires: Mapping[str, str] = field(default_factory=dict)
    cpu: Sequence[str] | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    checked: Mapping[str, Json] | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest(ManifestFields):
    """A manifest that was read and found sound. `digest` covers every file's digest: it names the bundle."""

    folder: Path
    files: Mapping[str, FileEntry]
    digest: str

    def to_dict(self) -> dict[str, Json]:
        """The manifest as the JSON object it was read from, without the digest that covers it."""
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        return {"format": FORMAT, "files": files} | {key: getattr(self, key) for key in FIELDS}

    def path(self, name: str) -> Path:
        """Where the file `name` lies; raises BundleError when the manifest lists it neither way."""
        if name not in self.files and name not in self.generated:
            raise BundleError(f"{self.folder / MANIFEST} lists no file {name!r}; export the bundle again")
        return safe_join(self.folder, name)

    @property
    def size(self) -> int:
        """Bytes of all files that are shipped."""
        return sum(entry.size for entry in self.files.values())

    @property
    def drawn(self) -> Mapping[str, FileEntry]:
        """The generated files."""
        return {name: FileEntry(entry["size"], entry["sha256"]) for name, entry in self.generated.items()}

    @property
    def is_gguf(self) -> bool:
        """Whether llama.cpp runs it, and no ONNX Runtime."""
        return self.model.endswith(GGUF)

    def adapter_named(self, asked: str | Path | None) -> str | None:
        """The name of the adapter that is asked for: "default", a name, None for the base alone.

        None where nothing runs beside the graph, as when it's merged ("default" alone can be asked for then).
        Raises MismatchError when there is no such adapter.
        """
        if self.mode == "merged":
            if asked != "default":
                raise MismatchError(
                    f"the adapter is merged into {self.folder} and can't be changed; export with --mode "
                    "branch to swap adapters"
                )
            return None
        name = self.default_adapter if asked == "default" else asked
        if name is not None and name not in self.adapters:
            names = ", ".join(self.adapters) or "none"
            raise MismatchError(f"{self.folder} has no adapter named {name!r}, only: {names}")
        return None if name is None else str(name)

    @property
    def needs_vnni(self) -> bool:
        """Whether its int8 products may overflow on x86 without VNNI, as far as the manifest tells.

        Bundles that don't record it came before exports took care: those with int8 activations need it.
        """
        if self.cpu is not None:
            return VNNI in self.cpu
        steps: Json = (self.plan or {}).get("steps")
        return isinstance(steps, list) and any(_rounds_activations(step) for step in steps)

    @property
    def expanded(self) -> Mapping[str, Mapping[str, Json]]:
        """Those of the generated files that are made from shipped weights."""
        return {name: entry for name, entry in self.generated.items() if "source" in entry}


def _rounds_activations(step: Json) -> bool:
    """Whether a plan's step says that the layer reads int8."""
    options = step.get("options") if isinstance(step, dict) else None
    return isinstance(options, dict) and options.get("activations", "float") != "float"


def _is_count(value: Json) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _is_hash(value: Json) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def parse(value: Mapping[str, Json], folder: Path, path: Path) -> Manifest:
    """A Manifest out of the JSON object, every field's type and meaning checked. Unknown keys are ignored."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise BundleError(f"{path}: {what}; export the bundle again")

    listed: Json = value.get("files")
    generated: Json = value.get("generated", {})
    need(_is_map(listed) and 0 < len(listed) <= _MAX_FILES, "files isn't an object of 1 to 10000 files")
    need(_is_map(generated) and len(generated) <= _MAX_FILES, "generated isn't an object of files")
    taken = set(UNLISTED)
    files = _parse_files(listed, folder, taken, need)
    _parse_files(generated, folder, taken, need)
    for key, (holds, what) in FIELDS.items():
        need(key in value or key in _OPTIONAL, f"{key} is missing")
        need(key not in value or holds(value[key]), f"{key} {what}")
    wrong = json_schema.problem(value, _schema())
    need(wrong is None, str(wrong))
    consistency.check(value, need)
    facts = {key: value[key] for key in FIELDS if key in value}
    return Manifest(folder=folder, files=files, digest=value["digest"], **facts)


@cache
def _schema() -> Mapping[str, Json]:
    found: Mapping[str, Json] = json.loads(Path(__file__).with_name("bundle.schema.json").read_bytes())
    return found


def check_limits(limits: Mapping[str, float], where: str) -> None:
    """Raise PlanError, naming `where`, for a limit that no figure can keep.

    That is one that isn't finite, a "max_" below 0, a "min_" above 1: what has a least is a share or cosine.
    """
    for name, bound in limits.items():
        if not abs(bound) < _LARGEST_BOUND:  # nor is NaN
            raise PlanError(f"{where}: {name} is {str(bound)[:40]} where a finite number belongs")
        if name.startswith("max_") and bound < 0:
            raise PlanError(f"{where}: {name} is {bound:g}, which nothing can keep; give 0 or more")
        if name.startswith("min_") and bound > 1:
            raise PlanError(f"{where}: {name} is {bound:g}, which nothing can keep; give 1 or less")


def _is_int32(value: Json) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_piece(value: Json) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3 or not _is_text(value[0]):
        return False
    start, stop = value[1:]
    return _is_count(start) and _is_count(stop) and start < stop


def _is_map(value: Json, holds: Callable[[Json], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(holds(item) for item in value.values())


def _is_text(value: Json) -> bool:
    return isinstance(value, str)


def _are_names(value: Json) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _has_digest(value: Json) -> bool:
    return isinstance(value, dict) and isinstance(value.get("digest"), str)


def _is_version(text: Json) -> bool:
    return isinstance(text, str) and _VERSION.fullmatch(text) is not None


def _is_number(value: Json) -> bool:
    return type(value) in (int, float)


# field of ManifestFields -> (what must hold, what to say when it doesn't)
FIELDS: Mapping[str, tuple[Callable[[Json], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"isn't one of {', '.join(KINDS)}"),
    "mode": (lambda value: value in MODES, f"isn't one of {', '.join(MODES)}"),
    "weights": (_is_text, "isn't the name of a weight format"),
    "base": (_has_digest, "isn't an object with a digest"),
    "model": (_is_text, "isn't a file name"),
    "adapters": (lambda value: _is_map(value, _has_digest), "isn't an object of adapters with digests"),
    "default_adapter": (lambda value: value is None or _is_text(value), "isn't the name of an adapter"),
    "projection": (lambda value: value is None or _has_digest(value), "isn't an object with a digest"),
    "lora_rank": (lambda value: value is None or _is_int32(value), "isn't an integer from 1 to 2**31 - 1"),
    "branches": (lambda value: _is_map(value, _are_names), "isn't an object of lists of modules"),
    "model_version": (
        lambda value: value is None or _is_int32(value),
        "isn't an integer from 1 to 2**31 - 1",
    ),
    "trained_names": (lambda value: _is_map(value, _is_text), "isn't an object of names"),
    "vectors": (
        lambda value: isinstance(value, list | tuple) and all(_is_piece(item) for item in value),
        "isn't a list of [module, start, stop]",
    ),
    "vector_dtype": (lambda value: value in VECTOR_DTYPES, f"isn't one of {', '.join(VECTOR_DTYPES)}"),
    "generated": (_is_map, "isn't an object of files"),
    "plan": (lambda value: value is None or _is_map(value), "isn't an object"),
    "options": (lambda value: _is_map(value, _is_text), "isn't an object of options"),
    "exact": (lambda value: value is None or isinstance(value, bool), "isn't true or false"),
    "limits": (lambda value: _is_map(value, _is_number), "isn't an object of numbers"),
    "golden": (lambda value: value is None or _is_text(value), "isn't a file name"),
    "requires": (lambda value: _is_map(value, _is_version), "isn't an object of version numbers"),
    "cpu": (
        lambda value: (
            value is None or (isinstance(value, list | tuple) and all(item in CPU_NEEDS for item in value))
        ),
        f"isn't a list of what vera-edge knows ({', '.join(CPU_NEEDS)})",
    ),
    "tools": (lambda value: _is_map(value, _is_text), "isn't an object of versions"),
    "checked": (lambda value: value is None or _is_map(value), "isn't an object"),
}


# Fields that came after format 1 was first written; a manifest without them means their defaults.
_OPTIONAL = frozenset(
    {
        "branches",
        "checked",
        "cpu",
        "exact",
        "generated",
        "lora_rank",
        "model_version",
        "options",
        "trained_names",
        "vector_dtype",
        "vectors",
    }
)


def _parse_files(
    value: Json, folder: Path, taken: set[str], need: Callable[[bool, str], None]
) -> dict[str, FileEntry]:
    """The entries of an object of files. `taken`: names in lower case that are given away already."""
    files: dict[str, FileEntry] = {}
    for name, entry in value.items():
        need(len(name) <= 512 and name.isprintable(), f"the file name {name[:80]!r} isn't a plain name")
        safe_join(folder, name)
        # Windows and macOS hold names that differ in case as one file.
        need(
            name.casefold() not in taken,
            f"the file {name!r} is listed twice, or is the manifest or its signature",
        )
        taken.add(name.casefold())
        sound = isinstance(entry, dict) and _is_count(entry.get("size")) and _is_hash(entry.get("sha256"))
        need(sound, f"the entry of {name!r} has no size and sha256")
        files[name] = FileEntry(entry["size"], entry["sha256"])
    return files
