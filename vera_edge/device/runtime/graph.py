"""An ONNX graph opened in ONNX Runtime for a small device, and what its inputs and outputs say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime

from vera_edge.arrays import Array
from vera_edge.cores import available_cores
from vera_edge.device.runtime import huge_pages, last_logits
from vera_edge.device.runtime.four_bit_graph import Rewritten
from vera_edge.errors import BundleError

Shape = tuple[int | str | None, ...]  # a name or None where the size isn't fixed
# How the names of an adapter's inputs end, by kind: a file brings all of a kind, or none.
KINDS = (
    (".lambda_b", ".lambda_d"),
    (".lora_A", ".lora_B"),
    (".output_gain",),
    (".input_gain",),
    (".output_bias",),
)
_VECTORS = tuple(end for kind in KINDS for end in kind)
_MOST_REWRITTEN = 64 << 20  # bytes of a file; ours hold the graph alone, and weights lie beside it
# Versions of ONNX Runtime.
_PACKS_AT_ONCE_SINCE, _SPINS_SHORTLY_SINCE = (1, 31), (1, 26)
# How long threads wait in a loop for the next product. On an idle machine as quick as ONNX Runtime's default,
# which is far longer; beside other programs that costs a third of the speed, and this a seventh.
_SPIN = "50"  # microseconds
_NO_MEMORY = re.compile(r"bad_?alloc|allocate memory|out of memory", re.IGNORECASE)
_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph: shape with names for free axes, dtype as numpy has it."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]


@dataclass
class GraphPorts:
    """What a graph's inputs and outputs say. vectors, options: inputs with a value of their own, an adapter's
    and others. metadata: the file's own properties."""

    path: Path
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    vectors: Mapping[str, Port]
    options: Mapping[str, Port]
    metadata: Mapping[str, str]

    @classmethod
    def of(
        cls,
        path: Path,
        inputs: Mapping[str, Port],
        outputs: Mapping[str, Port],
        overridable: Mapping[str, Port],
        metadata: Mapping[str, str],
    ) -> GraphPorts:
        """Those of a graph in `path`; overridable: the inputs that have a value of their own."""
        # vera.A and vera.B may be overridable too; they belong to the graph, not to an adapter.
        vectors = {name: port for name, port in overridable.items() if is_vector(name)}
        options = {name: port for name, port in overridable.items() if name not in vectors}
        return cls(path, inputs, outputs, vectors, options, metadata)


@dataclass(frozen=True)
class GraphSettings:
    """How a graph is opened, and so another one that stands for it.

    threads: within an operator; None: one for each of `available_cores`. held: initializers whose values
    aren't in the files, by name; kept as long as the graph is. exact_int8: multiply int8 weights as uint8
    where their products can overflow (int8_products.py). rewritten: what to open instead of the bytes in the
    file, beside which its other weights lie. pack_at_once: let all threads pack weights for the processor,
    and their pages stay until all are. huge: move what it allocates to pages of 2 MB. cut_logits: let the
    graph leave out logits that nobody asks for, where it can (last_logits.py).
    """

    threads: int | None = None
    held: Mapping[str, Array] = field(default_factory=dict)
    exact_int8: bool = True
    rewritten: Rewritten | None = None
    pack_at_once: bool = False
    huge: bool = False
    cut_logits: bool = False


USUAL = GraphSettings()


class Graph(GraphPorts):
    """An ONNX Runtime session on the CPU, with its ports. Running it is safe from several threads at once."""

    def __init__(
        self,
        path: Path,
        settings: GraphSettings = USUAL,
        part: bytes | None = None,
        written: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        """Open `path`; `moved` bytes were moved to pages of 2 MB, `notes` say which settings were left out.

        part: to open instead, of a graph that is some of it. written: initializers that are read where they
        lie, so that what is written there later counts; their values needn't be in the files.
        Raises BundleError when ONNX Runtime refuses the graph or its weights.
        """
        self.threads, self.rewritten = settings.threads or available_cores(), settings.rewritten
        self.settings = replace(settings, threads=self.threads)
        made = {} if self.rewritten is None else self.rewritten.held
        entries, self.notes = session_entries(self.settings, onnxruntime.__version__)
        options = _options(self.threads, entries)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        self._held = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in {**settings.held, **made}.items()
        }
        if self._held:
            options.add_external_initializers(list(self._held), list(self._held.values()))
        self._written = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in written.items()
        }
        for name, value in self._written.items():
            options.add_initializer(name, value)
        model = part or (None if self.rewritten is None else self.rewritten.model)
        if settings.cut_logits:
            model = _with_cut_logits(path, model)
        try:
            # Without a fallback: it would print, and try the same provider again.
            make = partial(
                onnxruntime.InferenceSession,
                model or path,
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
            self.session, self.moved = huge_pages.moving(make) if settings.huge else (make(), 0)
        except Exception as cause:  # onnxruntime's classes share no base but Exception
            raise BundleError(f"ONNX Runtime can't open {path}: {first_line(cause)}") from None
        session = self.session
        ports = GraphPorts.of(
            path,
            _ports(session.get_inputs(), path),
            _ports(session.get_outputs(), path),
            _ports(session.get_overridable_initializers(), path),
            session.get_modelmeta().custom_metadata_map,
        )
        super().__init__(**vars(ports))

    def binding(self) -> Any:
        """A fresh IO binding of this session."""
        return self.session.io_binding()

    def runner(self, binding: Any, vectors: Mapping[str, Array]) -> Callable[[], None]:
        """What runs `binding` whenever it's called, with an adapter's vectors (rows, ...)."""
        for name, array in vectors.items():
            bind(binding, self.vectors[name], array)
        return partial(self.session.run_with_iobinding, binding)


def is_vector(name: str) -> bool:
    """Whether an input, by its name, is an adapter's."""
    return name.endswith(_VECTORS)


def first_line(cause: BaseException) -> str:
    """The first line of a runtime's message, without the code position it starts with."""
    if _NO_MEMORY.search(str(cause)):
        return "memory ran out; free some, or take a smaller bundle"
    lines = str(cause).strip().splitlines()
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )", "", lines[0] if lines else type(cause).__name__)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def session_entries(settings: GraphSettings, version: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """ONNX Runtime's entries for these settings, and what a person should hear of those that are left out.

    version: of the ONNX Runtime that is to open the graph. One that doesn't know an entry passes over it and
    says nothing.
    """
    entries = {
        "session.intra_op.allow_spinning": "0",
        "session.x64quantprecision": "1" if settings.exact_int8 else "0",
    }
    if settings.threads == 1:
        return entries, ()
    knows, notes = release(version), []
    if knows >= _SPINS_SHORTLY_SINCE:
        entries |= {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": _SPIN}
    else:
        notes.append(_left_out(version, "lets threads wait asleep", _SPINS_SHORTLY_SINCE, "decoding"))
    if settings.pack_at_once and knows >= _PACKS_AT_ONCE_SINCE:
        entries["session.prepack.enable_parallel"] = "1"
    elif settings.pack_at_once:
        notes.append(_left_out(version, "packs weights with one thread", _PACKS_AT_ONCE_SINCE, "opening"))
    return entries, tuple(notes)


def _left_out(version: str, does: str, since: tuple[int, ...], what: str) -> str:
    needed = ".".join(map(str, since))
    return f"onnxruntime {version} {does}; from {needed} on {what} takes less time with several"


def _options(threads: int, entries: Mapping[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    # ONNX Runtime warns once for every overridable initializer; errors are raised, and told in a sentence.
    options.log_severity_level = 4
    # A pattern is kept for every shape seen, and a growing attention mask never has the same shape twice.
    options.enable_mem_pattern = False
    return options


def _with_cut_logits(path: Path, model: bytes | None) -> bytes | None:
    """The model, or None for that in `path`, rewritten so; as it is where it can't be."""
    with suppress(OSError, ValueError, IndexError, TypeError):  # a broken file is for ONNX Runtime to refuse
        if model is not None:
            return last_logits.rewrite(model) or model
        if path.stat().st_size <= _MOST_REWRITTEN:
            return last_logits.rewrite(path.read_bytes())
    return model


def _ports(arguments: Any, path: Path) -> dict[str, Port]:
    ports = {}
    for argument in arguments:
        if argument.type not in _TYPES:
            raise BundleError(f"{argument.name} of {path} is a {argument.type}, which vera-edge doesn't feed")
        ports[argument.name] = Port(argument.name, tuple(argument.shape), np.dtype(_TYPES[argument.type]))
    return ports


def bind(binding: Any, port: Port, array: Array, output: bool = False) -> None:
    """Bind `array`, contiguous and alive as long as the binding, to a port without a copy."""
    call = binding.bind_output if output else binding.bind_input
    call(port.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
