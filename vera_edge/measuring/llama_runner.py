"""A GGUF file in llama.cpp itself, as it runs for those who get it: the logits of any sequence of tokens.

llama.cpp comes with the package llama-cpp-python (the extra `llama`), whose plain C interface is used. It
rounds what linear layers read to 8-bit blocks and keeps keys and values in float16, and both are measured:
that is what a person gets who opens the file and changes nothing.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_edge.arrays import Float32
from vera_edge.cores import available_cores
from vera_edge.errors import BundleError, TargetError

_ERROR = 4  # ggml's level of a message
_BATCH = 512  # tokens that are computed together


class LlamaRunner:
    """A GGUF file, and a LoRA file beside it or none. `logits` starts every sequence anew."""

    def __init__(self, model: Path, lora: Path | None = None, context: int = 512) -> None:
        """Open `model` for sequences of up to `context` tokens, which it outgrows where one is longer.

        Raises TargetError without llama-cpp-python, BundleError when llama.cpp can't load a file.
        """
        self._library, self._said = _library(), list[str]()
        self._log = _listener(self._said)
        self._library.llama_log_set(self._log, ctypes.c_void_p(0))
        self._model = self._opened(
            model,
            self._library.llama_model_load_from_file(
                str(model).encode(), self._library.llama_model_default_params()
            ),
        )
        self._lora = None
        if lora is not None:
            self._lora = self._opened(
                lora, self._library.llama_adapter_lora_init(self._model, str(lora).encode())
            )
        self._path, self._context, self._size = model, None, 0
        vocabulary = self._library.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._library.llama_vocab_n_tokens(vocabulary))
        self._open_context(context)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def context(self) -> int:
        """The longest sequence that the file says it is for."""
        return int(self._library.llama_model_n_ctx_train(self._model))

    def logits(self, tokens: npt.NDArray[np.int64]) -> Float32:
        """Teacher-forced logits (n, vocab_size) of one sequence of n token ids."""
        if len(tokens) > self._size:
            self._open_context(len(tokens))
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        found = np.empty((len(tokens), self._vocab_size), np.float32)
        batch = library.llama_batch_init(_BATCH, 0, 1)
        try:
            for start in range(0, len(tokens), _BATCH):
                part = tokens[start : start + _BATCH]
                _fill(batch, part, start)
                if library.llama_decode(self._context, batch):
                    raise BundleError(f"llama.cpp can't compute {self._path}{self._why()}")
                rows = library.llama_get_logits(self._context)
                shape = (len(part), self._vocab_size)
                found[start : start + len(part)] = np.ctypeslib.as_array(rows, shape)
        finally:
            library.llama_batch_free(batch)
        return found

    def _opened(self, path: Path, handle: Any) -> Any:
        if not handle:
            raise BundleError(f"llama.cpp can't load {path}{self._why()}")
        return handle

    def _why(self) -> str:
        return f": {' '.join(''.join(self._said).split())}" if self._said else ""

    def _open_context(self, size: int) -> None:
        library = self._library
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = size, _BATCH, _BATCH
        options.n_threads = options.n_threads_batch = available_cores()
        if self._context is not None:
            library.llama_free(self._context)
        self._context = self._opened(self._path, library.llama_init_from_model(self._model, options))
        self._size = size
        if self._lora is not None:
            kind = library.llama_adapter_lora_p_ctypes
            adapters = (kind * 1)(ctypes.cast(self._lora, kind))
            if library.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)):
                raise BundleError(f"llama.cpp can't put a LoRA on {self._path}{self._why()}")

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self._library.llama_free(self._context)
        if getattr(self, "_model", None) is not None:
            self._library.llama_model_free(self._model)


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError as cause:
        raise TargetError(
            "a GGUF file is measured in llama.cpp, and llama-cpp-python isn't installed; install the extra: "
            "pip install 'vera-edge[llama]'"
        ) from cause
    llama_cpp.llama_backend_init()
    return llama_cpp


def _listener(said: list[str]) -> Any:
    """llama.cpp's way to talk: errors are kept for our own sentence, the rest isn't shown."""

    def listen(level: int, text: bytes, data: Any) -> None:
        if level == _ERROR and len(said) < 8:
            said.append(text.decode(errors="replace"))

    return ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(listen)


def _fill(batch: Any, tokens: npt.NDArray[np.int64], start: int) -> None:
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens.tolist()):
        batch.token[index], batch.pos[index] = token, start + index
        batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
