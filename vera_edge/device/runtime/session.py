"""A bundle opened on the device: one class for text, logits and adapters."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32, Tokens
from vera_edge.bundle.contents import Manifest
from vera_edge.device.runtime.batch import Batch
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.decoding import Decoder, Steps
from vera_edge.device.runtime.four_bit_graph import FourBit
from vera_edge.device.runtime.generate import Generation
from vera_edge.device.runtime.graph import Graph
from vera_edge.device.runtime.lookahead import Lookahead, check
from vera_edge.device.runtime.opened import AdapterChoice, Opened, check_resident, graph_bytes, open_graph
from vera_edge.device.runtime.prompt_cache import PromptCache
from vera_edge.device.runtime.resident import ResidentGraph
from vera_edge.device.runtime.sampling import Sampling
from vera_edge.device.runtime.template import Message
from vera_edge.errors import DataError, PlanError
from vera_edge.memory import free_memory

GREEDY = Sampling()


class Session(Opened):
    """An open decoder bundle.

    One session serves several threads at once: each generation has a cache and a random stream of its own,
    and keeps the adapter that was set when it began. `swap` changes the adapter for what begins afterwards.

    Example:
        >>> session = vera_edge.Session.open("bundle")
        >>> text = "".join(session.generate("Name three rivers.", max_tokens=4))
        >>> session.swap(None)  # the base alone
    """

    def __init__(
        self,
        manifest: Manifest,
        graph: Graph,
        decoder: Decoder,
        text: BundleText,
        prompts: PromptCache | None = None,
    ) -> None:
        super().__init__(manifest, graph)
        self.prompts = prompts or PromptCache(0)
        self.decoder, self.text, self.vocab_size = decoder, text, decoder.vocab_size
        self._ahead: Lookahead | None = None
        self._opening = threading.Lock()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        adapter: AdapterChoice = "default",
        *,
        threads: int | None = None,
        deep: bool = True,
        four_bit: FourBit | None = None,
        prompt_cache: int = 0,
        reread: bool = False,
        resident: bool = False,
        huge_pages: bool = False,
    ) -> Session:
        """Verify the bundle in `folder` and open it. Projections it doesn't bring are drawn in memory.

        adapter: "default" is the one the bundle names, another string a name of the bundle, a Path an
        .onnx_adapter file, None the base alone. deep: hold every byte to the manifest first; without it the
        content of files over 64 MiB isn't looked at. A file that was read by an earlier start and hasn't been
        written to since isn't read again but with `reread`. four_bit: how NF4 and FP4 weights run:
        "expanded" to int8 blocks in memory, to a thousandth of an adapter's effect; "int8", the same with
        activations rounded as in any int8 export; "kept", exactly and slowly; None is "kept" where the
        bundle's own limit on the mean KL is under 0.005, else "expanded". prompt_cache: bytes in which
        prompts are kept, so that what later ones begin with alike is computed once. resident: as for `swap`.
        huge_pages: move the weights to pages of 2 MB, which takes longer to open and less for each token;
        where the system can't, nothing happens.
        Raises BundleError when the bundle is damaged or foreign, AdapterError or MismatchError when the
        adapter can't be used, PlanError for `reread` without `deep`.
        """
        prompts = PromptCache(prompt_cache)
        opened = open_graph(Path(folder), "decoder", threads, deep, four_bit, reread, resident, huge_pages)
        manifest, graph, looked = opened
        decoder, text = Decoder.open(manifest.folder, graph), BundleText(manifest.folder)
        session = cls(manifest, graph, decoder, text, prompts)
        session.verified = looked
        session.swap(adapter, resident=resident)
        return session

    def swap(self, adapter: AdapterChoice, *, resident: bool = False) -> None:
        """Change the adapter: "default", a name of the bundle, an .onnx_adapter file, None for the base.

        resident: let it live in the graph, where it decodes a little faster, with the same logits, until
        another is resident. The first time, unless it was opened so, the graph is opened once more: that
        takes as long as opening, and as much memory as the weights again until what runs now has ended.
        Raises AdapterError or MismatchError when it can't be used, PlanError when there is too little memory;
        then the active one stays.
        """
        chosen = self._choose(adapter)
        if resident:
            self._resident_graph().put(chosen[1])
        self._active = chosen

    @property
    def resident(self) -> bool:
        """Whether an adapter can live in the graph that is open."""
        return isinstance(self.graph, ResidentGraph)

    def _resident_graph(self) -> ResidentGraph:
        """The graph of this session, opened once more where no adapter can live in it."""
        with self._opening:
            if isinstance(self.graph, ResidentGraph):
                return self.graph
            check_resident(self.manifest)
            needed, free = graph_bytes(self.manifest), free_memory()
            if free is not None and needed > free:
                raise PlanError(
                    f"a graph for a resident adapter takes {needed / 1e6:.1f} MB beside the open one, and "
                    f"this process may take {free / 1e6:.1f} MB of memory; open the bundle with resident=True"
                )
            made = ResidentGraph.beside(self.graph)
            self.decoder = replace(self.decoder, graph=made)
            self.graph = self._ports = made
            return made

    def logits(self, tokens: Tokens) -> Float32:
        """Teacher-forced logits (n, vocab) of one sequence (n,): row i predicts token i + 1."""
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        for start, chunk in self.logit_chunks(tokens):
            out[start : start + len(chunk)] = chunk
        return out

    def logit_chunks(self, tokens: Tokens) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The same as `logits` in pieces (start, (m, vocab)) of at most 24 MiB, each valid until the next."""
        tokens = self._checked(tokens)
        cache = self.decoder.cache(len(tokens))
        steps = Steps(self.decoder, cache, self._active[1], whole=len(tokens))
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
        stop: str | Sequence[str] = (),
        raw: bool = False,
        speculate: int = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Text for `prompt`, as an iterator of pieces; Sampling has the options, Generation the result.

        prompt: a string (the user's one message, or as it is when `raw` or the model has no chat template),
        messages with roles, or token ids (n,). tools (JSON schemas), documents and template_args, such as
        {"enable_thinking": False}: what the chat template reads beside the messages; see ChatTemplate.render.
        speculate: tokens to look ahead for where the text repeats itself, 0 for none; the text is the same,
        bit for bit. The first such call opens the graph a second time, see `look_ahead`.
        Raises DataError when the prompt is empty or too long, or when the template doesn't read an argument.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        if max_tokens < 0:
            raise DataError(f"max_tokens is {max_tokens}; it must be 0 or more")
        given = {"tools": tools, "documents": documents}
        arguments = {name: value for name, value in given.items() if value is not None}
        check(speculate)
        tokens = self.tokens(prompt, raw, {**(template_args or {}), **arguments})
        vectors, ahead = self._active[1], self.look_ahead(speculate) if speculate else None
        return Generation(
            self.decoder, self.text, tokens, vectors, sampling, max_tokens, stop, ahead, self.prompts
        )

    def look_ahead(self, tokens: int) -> Lookahead:
        """What `generate` reads `tokens` + 1 tokens a step with: opened once, and kept for this number.

        It takes as much memory as the weights again. Raises DataError for a number that can't be, PlanError
        when there isn't enough, or when this processor would give other logits: it is tried.
        """
        with self._opening:
            if self._ahead is None or self._ahead.tokens != tokens:
                self._ahead = None
                self._ahead = Lookahead.open(self.decoder, tokens)
            return self._ahead

    async def stream(self, prompt: str | Sequence[Message] | Tokens, **options: Any) -> AsyncIterator[str]:
        """`generate` for asyncio: each piece is computed in a thread, so the event loop stays free."""
        import asyncio  # a tenth of a start that asks for none

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
        stop: str | Sequence[str] = (),
        raw: bool = False,
        template_args: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Text for several prompts at once, as an iterator of (row, piece); see Batch.

        adapters: one for each row, as for `swap`, which needs a graph with a batch axis on its vectors; by
        default all rows run the active one. template_args: as for `generate`, tools and documents among them.
        Raises MismatchError when the graph can't.
        """
        vectors = [self._active[1]] * len(prompts)
        if adapters is not None:
            loaded = {choice: self._choose(choice)[1] for choice in set(adapters)}
            vectors = [loaded[choice] for choice in adapters]
        if len(vectors) != len(prompts) or not prompts:
            raise DataError(f"{len(vectors)} adapters for {len(prompts)} prompts; give one for each prompt")
        tokens = [self.tokens(prompt, raw, template_args or {}) for prompt in prompts]
        return Batch(self.decoder, self.text, tokens, vectors, sampling, max_tokens, stop, self.prompts)

    def tokens(
        self, prompt: str | Sequence[Message] | Tokens, raw: bool, arguments: Mapping[str, Any]
    ) -> Tokens:
        """The token ids (n,) that `generate` feeds for a prompt; arguments: of the chat template.

        Raises DataError when the prompt is empty or too long, or an argument would have no effect.
        """
        if isinstance(prompt, np.ndarray):
            if arguments:
                raise DataError(
                    f"{next(iter(arguments))} is for a chat template, and the prompt is token ids"
                )
            return self._checked(prompt)
        return self.text.prompt(prompt, raw or not self.text.has_template, arguments)

    def _checked(self, tokens: Tokens) -> Tokens:
        if tokens.ndim != 1 or not 0 < len(tokens) <= self.decoder.context:
            raise DataError(f"tokens of shape {list(tokens.shape)}: 1 to {self.decoder.context} in a row fit")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise DataError(f"a token id is outside the vocabulary of {self.vocab_size}")
        return np.ascontiguousarray(tokens, np.int64)
