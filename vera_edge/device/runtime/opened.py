"""A bundle's graph and the adapter that runs in it: what decoders and encoders have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime

from vera_edge.bundle import contents as bundle
from vera_edge.bundle import verified
from vera_edge.bundle.contents import Manifest
from vera_edge.bundle.verified import Verified
from vera_edge.cores import available_cores
from vera_edge.device.runtime import adapters, four_bit_graph, generated, int8_products
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.four_bit_graph import FourBit
from vera_edge.device.runtime.graph import Graph, GraphPorts, GraphSettings, release
from vera_edge.device.runtime.resident import ResidentGraph
from vera_edge.errors import BundleError, MismatchError
from vera_edge.memory import free_memory

_LARGE = 256 << 20  # bytes; smaller graphs open in a third of a second
AdapterChoice = str | Path | None


def named(word: str, manifest: Manifest) -> AdapterChoice:
    """What a command line means by `word`: "none", a name of the bundle, or a file, which holds a slash or
    ends in .onnx_adapter. Raises MismatchError for "none" where the bundle has an adapter of that name."""
    if word == bundle.NO_ADAPTER:
        if word in manifest.adapters and manifest.mode == "branch":
            raise MismatchError(
                f"{manifest.folder} has an adapter that is called {word}, which is also how one asks for the "
                f"base alone; give its file, {manifest.folder / manifest.adapters[word]['file']}"
            )
        return None
    return Path(word) if "/" in word or "\\" in word or word.endswith(".onnx_adapter") else word


class Adaptable:
    """A bundle and its adapter. `swap` changes it for what begins afterwards; the weights aren't touched."""

    def __init__(self, manifest: Manifest, ports: GraphPorts) -> None:
        self.manifest, self._ports = manifest, ports
        self._active: tuple[AdapterChoice, Vectors] = (None, {})

    @property
    def adapter(self) -> AdapterChoice:
        """What runs now: a name of the bundle, a file, None for the base alone, "default" when merged."""
        return self._active[0]

    @property
    def vectors(self) -> Vectors:
        """The active adapter's vectors by graph input; empty for the base alone and for merged bundles."""
        return self._active[1]

    def swap(self, adapter: AdapterChoice) -> None:
        """Change the adapter: "default", a name of the bundle, an .onnx_adapter file, None for the base.

        Raises AdapterError or MismatchError when it can't be used; then the active one stays.
        """
        self._active = self._choose(adapter)

    def vectors_of(self, adapter: AdapterChoice) -> Vectors:
        """The vectors of an adapter, which needn't be the active one; raises as `swap`."""
        return self._choose(adapter)[1]

    def _choose(self, adapter: AdapterChoice) -> tuple[AdapterChoice, Vectors]:
        merged = self.manifest.mode == "merged"
        if isinstance(adapter, Path) and not merged:
            return adapter, adapters.load(adapter, self._ports, self._model_version(adapter))
        name = self.manifest.adapter_named(adapter)
        if name is None:
            return ("default" if merged else None), {}
        path = self.manifest.path(self.manifest.adapters[name]["file"])
        return name, adapters.load(path, self._ports, self._model_version(path))

    def _model_version(self, path: Path) -> int | None:
        """The model version that a file must carry: the manifest's, else that of the own adapters."""
        if self.manifest.model_version is not None:
            return self.manifest.model_version
        for entry in self.manifest.adapters.values():
            own = self.manifest.path(entry["file"])
            if own != path:
                return adapters.version(own)
        return None


class Opened(Adaptable):
    """An open bundle. verified: what its verification looked at, where it was opened by its folder."""

    def __init__(self, manifest: Manifest, graph: Graph, looked: Verified | None = None) -> None:
        super().__init__(manifest, graph)
        self.graph, self.verified = graph, looked


def check_kind(manifest: Manifest, kind: str) -> None:
    """Raise BundleError for a bundle that isn't for ONNX Runtime as it is here, or not of this `kind`."""
    folder = manifest.folder
    if manifest.is_gguf:
        raise BundleError(f"{folder} is for llama.cpp; run it with: {llama_command(manifest)}")
    if manifest.kind != kind:
        hint = {
            "encoder": "an encoder, which generates no text; open it as vera_edge.Encoder",
            "decoder": "a decoder, which gives text; open it as vera_edge.Session",
        }[manifest.kind]
        raise BundleError(f"{folder} holds {hint}")
    _check_runtime(manifest)


def open_graph(
    folder: Path,
    kind: str,
    threads: int | None = None,
    deep: bool = True,
    four_bit: FourBit | None = "kept",
    reread: bool = False,
    resident: bool = False,
    huge_pages: bool = False,
) -> tuple[Manifest, Graph, Verified]:
    """Verify a bundle of this `kind` and open its graph. What it leaves to be generated is made in memory.

    deep, four_bit, reread, huge_pages: as in `Session.open`, but for `four_bit`'s default. resident: a
    ResidentGraph.
    Raises PlanError for a `four_bit` that isn't known, MismatchError where no adapter can be resident,
    BundleError when the bundle is damaged, foreign, of another kind, or needs a newer runtime or more memory.
    Warns (BundleWarning) when other programs would get wrong values from it on this processor.
    """
    manifest, looked = verified.verify(folder, deep, reread)
    check_kind(manifest, kind)
    if resident:
        check_resident(manifest)
    model = manifest.path(manifest.model)
    if four_bit is None:
        four_bit = "kept" if manifest.limits.get("max_kl", 1) < four_bit_graph.LOSS else "expanded"
    four_bit_graph.check(four_bit)
    found = [] if four_bit == "kept" else four_bit_graph.products(model)
    _check_memory(manifest, four_bit_graph.added_bytes(found))
    exact = int8_products.must_be_exact(manifest)
    rewritten = (
        four_bit_graph.rewrite(model, found, four_bit, threads or available_cores()) if found else None
    )
    held, at_once = generated.in_memory(manifest), _can_pack_at_once(manifest)
    decodes = kind == "decoder"
    settings = GraphSettings(threads, held, exact, rewritten, at_once, huge_pages, cut_logits=decodes)
    graph = ResidentGraph(model, settings) if resident else Graph(model, settings)
    return manifest, graph, looked


def check_resident(manifest: Manifest) -> None:
    """Raise MismatchError for a bundle in whose graph no adapter can live."""
    if manifest.mode != "branch":
        raise MismatchError(
            f"{manifest.folder} has its adapter merged, and is faster so; only a branch's can be resident"
        )


def llama_command(manifest: Manifest, path: Callable[[str], object] | None = None) -> str:
    """How llama.cpp's server is started with a bundle's GGUF file, its default adapter beside it.

    path: how a file of the bundle is written; None: where it is.
    """
    place, name = path or manifest.path, manifest.default_adapter
    file = manifest.adapters[name]["file"] if name is not None else None
    command = f"llama-server -m {place(manifest.model)}"
    return command if file is None else f"{command} --lora {place(file)}"


def graph_bytes(manifest: Manifest) -> int:
    """The size of a bundle's graph, its weights included, those too that are drawn on the device."""
    within = Path(manifest.model).parent
    sizes = {name: entry.size for name, entry in (*manifest.files.items(), *manifest.drawn.items())}
    return sum(size for name, size in sizes.items() if Path(name).parent == within)


def _can_pack_at_once(manifest: Manifest) -> bool:
    """Whether a graph is large enough to win by it, and memory too: its weights are held twice meanwhile."""
    needed, free = graph_bytes(manifest), free_memory()
    return needed >= _LARGE and (free is None or free >= 3 * needed)


def _check_memory(manifest: Manifest, expanded: int) -> None:
    """Refuse what can't fit: libraries in C++ and Rust end the process when memory runs out.

    expanded: bytes that 4-bit weights take besides, as what they run as.
    """
    needed = graph_bytes(manifest)
    free = free_memory()
    if free is not None and needed <= free < needed + expanded:
        raise BundleError(
            f"{manifest.folder} holds 4-bit weights that take {expanded / 1e6:.1f} MB more as int8 blocks, "
            f"{(needed + expanded) / 1e6:.1f} MB in all, and this process may take {free / 1e6:.1f} MB of "
            "memory; free some, or run them as they are, slowly: --four-bit kept"
        )
    if free is not None and free < needed:
        raise BundleError(
            f"{manifest.folder} holds a model of {needed / 1e6:.1f} MB and this process may take "
            f"{free / 1e6:.1f} MB of memory; free some, or take a smaller bundle"
        )


def _check_runtime(manifest: Manifest) -> None:
    needed = manifest.requires.get("onnxruntime")
    if needed is None:
        return
    if release(onnxruntime.__version__) < release(needed):
        raise BundleError(
            f"{manifest.folder} needs onnxruntime {needed} or newer, not {onnxruntime.__version__}; update it"
        )
