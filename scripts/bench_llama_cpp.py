"""llama.cpp through llama-cpp-python, as a worker of the speed benches: see bench_turns.Worker.

    python bench_llama_cpp.py MODEL.gguf --threads N     tokens on a line in, two speeds on a line out
    python bench_llama_cpp.py SOURCE.gguf --quantize OUT.gguf [--kind Q4_0]    by llama.cpp's own quantizer

Run by the interpreter of an environment of its own, which `environment` makes; so it imports nothing of ours.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python==0.3.36"
_SERVER = PACKAGE.replace("==", "[server]==")
# The parts that aren't used here take as long to compile as those that are.
_CMAKE = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
PROMPT = 512  # as bench_turns.LONG
# llama.cpp's converter, in the environment's folder: it comes with the source, not with what is compiled.
CONVERTER = Path("llama.cpp") / "convert_hf_to_gguf.py"
_CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")


def environment(folder: Path) -> Path:
    """The Python of an environment with llama-cpp-python, compiled here from the registry's source."""
    python = folder / "bin" / "python"
    check = [str(python), "-c", "import llama_cpp.server.app"]
    if not python.is_file() or subprocess.run(check, capture_output=True).returncode:
        print("compiling llama.cpp, which takes some minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [str(python), "-m", "pip", "install", "-q", "--no-binary", "llama-cpp-python", _SERVER]
        subprocess.run(command, check=True, env=os.environ | {"CMAKE_ARGS": _CMAKE})
    return python


def converter(folder: Path) -> Path:
    """llama.cpp's converter out of the package's source, in `folder`; it needs torch and transformers."""
    script = folder / CONVERTER
    if not script.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", temporary]
            command += ["--no-binary", "llama-cpp-python", PACKAGE]
            subprocess.run(command, check=True)
            (source,) = Path(temporary).glob("*.tar.gz")
            _unpack_converter(source, script.parent)
    return script


def _unpack_converter(source: Path, folder: Path) -> None:
    with tarfile.open(source) as archive:
        wanted = []
        for member in archive.getmembers():
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            parts = inside.split("/")
            if parts[0] in _CONVERTER_PARTS and ".." not in parts and member.isfile():
                member.name = inside
                wanted.append(member)
        # Python 3.11.4 brought filters; names and kinds of members are checked above in any case.
        given: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, wanted, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantize", metavar="OUT")
    parser.add_argument("--kind", default="Q4_0", help="what --quantize writes, by llama.cpp's name")
    given = parser.parse_args()
    llama_cpp: Any = importlib.import_module("llama_cpp")

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    if given.quantize:
        quantize(llama_cpp, given.model, given.quantize, given.kind)
        return
    serve(llama_cpp, given.model, given.threads)


def quantize(llama_cpp: Any, source: str, out: str, kind: str) -> None:
    """Write `source` as `kind` ("Q4_0") to `out`, as llama.cpp's own quantizer does."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options)):
        raise SystemExit(f"llama.cpp can't quantize {source} to {kind}")


def serve(llama_cpp: Any, path: str, threads: int) -> None:
    """Answer each number of tokens with the speeds of the prompt, and of decoding that many after it."""
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 1024, threads, threads
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    print("ready", flush=True)
    for line in sys.stdin:
        print(_decode(llama_cpp, context, vocabulary, int(line)), flush=True)


def _decode(llama_cpp: Any, context: Any, vocabulary: int, tokens: int) -> str:
    import numpy as np

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    feed = list(range(100, 100 + PROMPT))
    begun = started = time.perf_counter()
    for step in range(tokens + 1):
        array = (llama_cpp.llama_token * len(feed))(*feed)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(feed))):
            raise SystemExit("llama.cpp can't decode")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        feed = [int(logits.argmax())]
        if step == 0:
            started = time.perf_counter()
    return f"{PROMPT / (started - begun)} {tokens / (time.perf_counter() - started)}"


def _silent(level: int, text: bytes, data: Any) -> None:
    """Keep llama.cpp's talk off the terminal."""


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_silent)


if __name__ == "__main__":
    main()
