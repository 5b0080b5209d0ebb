"""A bundle opened on the device: one class for text, logits and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from vera_edge import bundle
from vera_edge.bundle import Manifest
from vera_edge.device import adapters, projections
from vera_edge.device.adapters import Vectors
from vera_edge.device.batch import Batch
from vera_edge.device.chat import Message, Text
from vera_edge.device.decoding import Decoder, Steps
from vera_edge.device.generate import Generation
from vera_edge.device.graph import Graph
from vera_edge.device.sampling import Sampling
from vera_edge.errors import BundleError, DataError, MismatchError

Float32 = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
AdapterChoice = str | Path | None
GREEDY = Sampling()


class Session:
    """An open decoder bundle.

    One session serves several threads at once: each generation has a cache and a random stream of its own,
    and keeps the adapter that was set when it began. `swap` changes the adapter for what begins afterwards.
    """

    def __init__(self, manifest: Manifest, graph: Graph, decoder: Decoder, text: Text) -> None:
        self.manifest, self.graph, self.decoder, self.text = manifest, graph, decoder, text
        self.vocab_size = decoder.vocab_size
        self._active: tuple[AdapterChoice, Vectors] = (None, {})

    @classmethod
    def open(
        cls,
        folder: Path | str,
        adapter: AdapterChoice = "default",
        *,
        threads: int | None = None,
        deep: bool = False,
    ) -> Session:
        """Verify the bundle in `folder` and open it. Projections it doesn't bring are drawn in memory.

        adapter: "default" is the one the bundle names, another string a name of the bundle, a Path an
        .onnx_adapter file, None the base alone. deep: read every byte first, as `vera-edge verify` does.
        Raises BundleError when the bundle is damaged or foreign, AdapterError or MismatchError when the
        adapter can't be used.
        """
        manifest = bundle.verify(Path(folder), deep=deep)
        if manifest.kind != "decoder":
            raise BundleError(f"{folder} holds an {manifest.kind}, which generates no text")
        _check_runtime(manifest)
        graph = Graph(manifest.path(manifest.model), threads, projections.in_memory(manifest))
        session = cls(manifest, graph, Decoder.open(manifest.folder, graph), Text(manifest.folder))
        session.swap(adapter)
        return session

    @property
    def adapter(self) -> AdapterChoice:
        """What runs now: a name of the bundle, a file, None for the base alone, "default" when merged."""
        return self._active[0]

    @property
    def vectors(self) -> Vectors:
        """The active adapter's vectors by graph input; empty for the base alone and for merged bundles."""
        return self._active[1]

    def swap(self, adapter: AdapterChoice) -> None:
        """Change the adapter, as for `open`. The base's weights aren't touched; it takes milliseconds."""
        self._active = self._choose(adapter)

    def logits(self, tokens: Tokens) -> Float32:
        """Teacher-forced logits (n, vocab) of one sequence (n,): row i predicts token i + 1."""
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        for start, chunk in self.logit_chunks(tokens):
            out[start : start + len(chunk)] = chunk
        return out

    def logit_chunks(self, tokens: Tokens) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The same as `logits` in pieces (start, (m, vocab)) of at most 24 MiB, each valid until the next."""
        tokens = self._checked(tokens)
        steps = Steps(self.decoder, self.decoder.cache(len(tokens)), self._active[1])
        yield from steps.chunks(tokens)

    def generate(
        self,
        prompt: str | Sequence[Message] | Tokens,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Generation:
        """Text for `prompt`, as an iterator of pieces; Sampling has the options, Generation the result.

        prompt: a string (the user's one message, or as it is when `raw` or the model has no chat template),
        messages with roles, or token ids (n,).
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        if max_tokens < 0:
            raise DataError(f"max_tokens is {max_tokens}; it must be 0 or more")
        tokens = self._tokens(prompt, raw)
        return Generation(self.decoder, self.text, tokens, self._active[1], sampling, max_tokens, stop)

    async def stream(self, prompt: str | Sequence[Message] | Tokens, **options: Any) -> AsyncIterator[str]:
        """`generate` for asyncio: each piece is computed in a thread, so the event loop stays free."""
        generation = self.generate(prompt, **options)
        while (piece := await asyncio.to_thread(next, generation, None)) is not None:
            yield piece

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message] | Tokens],
        adapters: Sequence[AdapterChoice] | None = None,
        *,
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        raw: bool = False,
    ) -> Batch:
        """Text for several prompts at once, as an iterator of (row, piece); see Batch.

        adapters: one for each row, as for `swap`, which needs a graph with a batch axis on its vectors; by
        default all rows run the active one. Raises MismatchError when the graph can't.
        """
        vectors = [self._active[1]] * len(prompts)
        if adapters is not None:
            loaded = {choice: self._choose(choice)[1] for choice in set(adapters)}
            vectors = [loaded[choice] for choice in adapters]
        if len(vectors) != len(prompts) or not prompts:
            raise DataError(f"{len(vectors)} adapters for {len(prompts)} prompts; give one for each prompt")
        tokens = [self._tokens(prompt, raw) for prompt in prompts]
        return Batch(self.decoder, self.text, tokens, vectors, sampling, max_tokens)

    def _tokens(self, prompt: str | Sequence[Message] | Tokens, raw: bool) -> Tokens:
        if isinstance(prompt, np.ndarray):
            return self._checked(prompt)
        return self.text.prompt(prompt, raw=raw or not self.text.has_template)

    def _checked(self, tokens: Tokens) -> Tokens:
        if tokens.ndim != 1 or not 0 < len(tokens) <= self.decoder.context:
            raise DataError(f"tokens of shape {list(tokens.shape)}: 1 to {self.decoder.context} in a row fit")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise DataError(f"a token id is outside the vocabulary of {self.vocab_size}")
        return np.ascontiguousarray(tokens, np.int64)

    def _choose(self, adapter: AdapterChoice) -> tuple[AdapterChoice, Vectors]:
        named = self.manifest.adapters
        if self.manifest.mode == "merged":
            if adapter != "default":
                raise MismatchError(
                    f"the adapter is merged into {self.manifest.folder} and can't be changed; export with "
                    "--mode branch to swap adapters"
                )
            return adapter, {}
        if adapter == "default":
            adapter = self.manifest.default_adapter
        if adapter is None:
            return None, {}
        if isinstance(adapter, str) and adapter not in named:
            raise MismatchError(
                f"{self.manifest.folder} has no adapter named {adapter!r}, only: {', '.join(named) or 'none'}"
            )
        path = adapter if isinstance(adapter, Path) else self.manifest.path(named[adapter]["file"])
        return adapter, adapters.load(path, self.graph, self._model_version(path))

    def _model_version(self, path: Path) -> int | None:
        """The model version that a file must carry: the manifest's, else that of the own adapters."""
        if self.manifest.model_version is not None:
            return self.manifest.model_version
        for entry in self.manifest.adapters.values():
            own = self.manifest.path(entry["file"])
            if own != path:
                return adapters.version(own)
        return None


def _check_runtime(manifest: Manifest) -> None:
    needed = manifest.requires.get("onnxruntime")
    if needed is None:
        return

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())

    if numbers(onnxruntime.__version__) < numbers(needed):
        raise BundleError(
            f"{manifest.folder} needs onnxruntime {needed} or newer, not {onnxruntime.__version__}; update it"
        )
