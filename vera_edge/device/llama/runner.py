"""A GGUF file in llama.cpp itself, as it runs for those who get it: the logits of any sequence of tokens.

llama.cpp comes with the package llama-cpp-python (the extra `llama`), whose plain C interface is used. It
rounds what linear layers read to 8-bit blocks and keeps keys and values in float16, and both are measured:
that is what a person gets who opens the file and changes nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.cores import available_cores
from vera_edge.errors import BundleError, TargetError

_ERROR = 4  # ggml's level of a message
_BATCH = 512  # tokens that are computed together
_SAID: list[str] = []  # the library's errors since something was last asked of it; it has one ear for all


class LlamaRunner:
    """A GGUF file, and a LoRA file beside it or none. `logits` starts every sequence anew."""

    def __init__(
        self, model: Path, lora: Path | None = None, context: int = 512, threads: int | None = None
    ) -> None:
        """Open `model` for sequences of up to `context` tokens, which it outgrows where one is longer.

        threads: None takes all cores. Raises TargetError without llama-cpp-python, BundleError when llama.cpp
        can't load a file.
        """
        self._library = library()
        self.threads = threads or available_cores()
        options = self._library.llama_model_default_params()
        self._model = _opened(model, self._library.llama_model_load_from_file(str(model).encode(), options))
        self._loras: dict[Path, Any] = {}
        self._lora: Any = None
        self._path, self._context, self._size = model, None, 0
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self._open_context(context)
        self.swap(lora)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def context(self) -> int:
        """The longest sequence that the file says it is for."""
        return int(self._library.llama_model_n_ctx_train(self._model))

    def swap(self, lora: Path | None) -> None:
        """Put a LoRA file in the place of the one that runs; None for the base alone. The weights stay.

        Raises BundleError when llama.cpp can't take it; then the one before stays.
        """
        if lora is not None and lora not in self._loras:
            handle = self._library.llama_adapter_lora_init(self._model, str(lora).encode())
            self._loras[lora] = _opened(lora, handle)
        self._lora = None if lora is None else self._loras[lora]
        self._apply_lora()

    def logits(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Teacher-forced logits (n, vocab_size) of one sequence of n token ids."""
        self._begin(len(tokens))
        found = np.empty((len(tokens), self._vocab_size), np.float32)
        for start, rows in self._fed(tokens, 0):
            found[start : start + len(rows)] = rows
        return found

    def parts(self, tokens: npt.NDArray[np.int64], prompt: int) -> Iterator[tuple[int, Float32]]:
        """The same logits as (start, rows): the first `prompt` tokens together, each of the others alone.

        That is how text is generated, and other kernels run there. Rows are valid until the next.
        """
        self._begin(len(tokens))
        yield from self._fed(tokens[:prompt], 0)
        for at in range(prompt, len(tokens)):
            yield from self._fed(tokens[at : at + 1], at)

    def greedy(self, tokens: npt.NDArray[np.int64], count: int) -> list[int]:
        """Up to `count` tokens that the model would go on with; a token that ends the text isn't among them.

        llama.cpp knows the ends of a text by the file's metadata, and some by their name.
        """
        self._begin(len(tokens) + count)
        found: list[int] = []
        at, feed = 0, tokens
        while len(found) < count:
            for start, rows in self._fed(feed, at):
                at, last = start + len(rows), rows[-1]
            chosen = int(last.argmax())
            if self.ends_text(chosen):
                break
            found.append(chosen)
            feed = np.array([chosen], np.int64)
        return found

    def ends_text(self, token: int) -> bool:
        """Whether llama.cpp ends a text at this token."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    def _begin(self, length: int) -> None:
        if length > self._size:
            self._open_context(length)
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _fed(self, tokens: npt.NDArray[np.int64], at: int) -> Iterator[tuple[int, Float32]]:
        """Logits of `tokens`, the first of which stands at `at`, as (start, rows); rows until the next."""
        library = self._library
        batch = library.llama_batch_init(min(_BATCH, len(tokens)), 0, 1)
        try:
            for start in range(0, len(tokens), _BATCH):
                part = tokens[start : start + _BATCH]
                _fill(batch, part, at + start)
                if library.llama_decode(self._context, batch):
                    raise BundleError(f"llama.cpp can't compute {self._path}{_why()}")
                rows = library.llama_get_logits(self._context)
                yield at + start, np.ctypeslib.as_array(rows, (len(part), self._vocab_size))
        finally:
            library.llama_batch_free(batch)

    def _open_context(self, size: int) -> None:
        library = self._library
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = size, _BATCH, _BATCH
        options.n_threads = options.n_threads_batch = self.threads
        if self._context is not None:
            library.llama_free(self._context)
        self._context = _opened(self._path, library.llama_init_from_model(self._model, options))
        self._size = size
        self._apply_lora()

    def _apply_lora(self) -> None:
        kind = self._library.llama_adapter_lora_p_ctypes
        chosen = [] if self._lora is None else [ctypes.cast(self._lora, kind)]
        count = len(chosen)
        adapters, scales = (kind * count)(*chosen), (ctypes.c_float * count)(*[1.0] * count)
        if self._library.llama_set_adapters_lora(self._context, adapters, count, scales):
            raise BundleError(f"llama.cpp can't put a LoRA on {self._path}{_why()}")

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self._library.llama_free(self._context)
        if getattr(self, "_model", None) is not None:
            self._library.llama_model_free(self._model)


@cache
def library() -> Any:
    """llama-cpp-python's C interface, its talk kept off the terminal. Raises TargetError without it."""
    try:
        import llama_cpp
    except ImportError as cause:
        raise TargetError(
            "a GGUF file runs in llama.cpp here, and llama-cpp-python isn't installed; install the extra: "
            "pip install 'vera-edge[llama]'"
        ) from cause
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_listener(), ctypes.c_void_p(0))
    return llama_cpp


@cache
def _listener() -> Any:
    """llama.cpp's way to talk: errors are kept for our own sentence. Cached, as C holds it for good."""

    def listen(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR and len(_SAID) < 8:
            _SAID.append(text.decode(errors="replace"))

    return ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(listen)


def _opened(path: Path, handle: Any) -> Any:
    if not handle:
        raise BundleError(f"llama.cpp can't load {path}{_why()}")
    return handle


def _why() -> str:
    """What llama.cpp said of an error, after a colon; it is forgotten then."""
    said = " ".join("".join(_SAID).split())
    _SAID.clear()
    return f": {said}" if said else ""


def _fill(batch: Any, tokens: npt.NDArray[np.int64], start: int) -> None:
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens.tolist()):
        batch.token[index], batch.pos[index] = token, start + index
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
