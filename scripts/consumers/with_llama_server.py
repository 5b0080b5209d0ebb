"""Adapters swapped in llama.cpp's server, by requests: with_llama_server.py FOLDER PROMPT COUNT LORA LORA.

Starts `llama-server` where one is installed, with every LoRA loaded, and says by POST /lora-adapters which
one runs; else the server of llama-cpp-python, which has each LoRA as a model of its own and swaps by its
name. Run by the interpreter of an environment of its own (bench_llama_cpp.environment), so it imports nothing
of ours.
Asks with the first, the second, and the first again. Prints JSON: consumer, texts.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
_SECONDS = 300  # until the server answers; a busy machine takes its time


def main() -> None:
    """Start a server, ask three times, end it."""
    model, prompt, count = Path(sys.argv[1]) / "model.gguf", sys.argv[2], int(sys.argv[3])
    loras = sys.argv[4:6]
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    binary = shutil.which("llama-server")
    with tempfile.TemporaryDirectory() as folder:
        command = _python_server(model, loras, port, Path(folder))
        if binary is not None:
            command = [binary, "-m", str(model), "--host", HOST, "--port", str(port), "-c", "256"]
            command += [word for lora in loras for word in ("--lora", lora)]
        with Path(folder, "said").open("wb") as said:
            server = subprocess.Popen(command, stdout=said, stderr=said)
            try:
                _wait(server, port, Path(folder, "said"))
                ask = _ask_python if binary is None else _ask_binary
                texts = [ask(port, index, prompt, count) for index in (0, 1, 0)]
            finally:
                server.terminate()
                server.wait()
    name = "llama-server" if binary else "llama_cpp.server"
    print(json.dumps({"consumer": name, "texts": texts}))


def _python_server(model: Path, loras: list[str], port: int, folder: Path) -> list[str]:
    models = [
        {"model": str(model), "model_alias": str(index), "lora_path": lora, "n_ctx": 256, "verbose": False}
        for index, lora in enumerate(loras)
    ]
    config = folder / "config.json"
    config.write_text(json.dumps({"host": HOST, "port": port, "models": models}))
    return [sys.executable, "-m", "llama_cpp.server", "--config_file", str(config)]


def _wait(server: "subprocess.Popen[bytes]", port: int, said: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/v1/models", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server doesn't answer: {said.read_text(errors='replace')[-2000:]}")


def _ask_python(port: int, index: int, prompt: str, count: int) -> str:
    given = {"model": str(index), "prompt": prompt, "max_tokens": count, "temperature": 0}
    found = _post(port, "/v1/completions", {**given, "repeat_penalty": 1.0})
    return str(found["choices"][0]["text"])


def _ask_binary(port: int, index: int, prompt: str, count: int) -> str:
    _post(port, "/lora-adapters", [{"id": one, "scale": float(one == index)} for one in (0, 1)])
    found = _post(port, "/completion", {"prompt": prompt, "n_predict": count, "temperature": 0})
    return str(found["content"])


def _post(port: int, path: str, value: object) -> Any:
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", json.dumps(value).encode(), head)
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
