"""One artefact, its consumers: the same greedy text, the same embedding, in all of them.

Exports the demo's decoder (merged and as a side-branch, int8) and an encoder (float32, int8, and int8 with
int8 activations, dynamic and static), opens each folder in vera_edge, plain ONNX Runtime, ONNX Runtime GenAI,
Optimum and Transformers.js, the decoder with float16 ends in headless Chromium where that is installed, and
the model as GGUF in llama.cpp and in its server with two adapters, and exits 1 when one says something else.
Run by scripts/test_consumers, which makes the environments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from scripts import bench_llama_cpp, demo_encoder, lora_training, prepare_demo
from scripts.consumers import with_browser
from vera_edge.device.runtime.chat import BundleText
from vera_edge.exporting import frozen_graph, target
from vera_edge.measuring.opened_reference import OpenedReference, open_trained

HERE = Path(__file__).resolve().parent / "consumers"
PROMPT, COUNT = "The for statement is used to", 24
PROMPTS = (PROMPT, "An assignment statement evaluates", "The import statement")
# Logits by which torch's own choice may be ahead of what another takes. Q8_0 weights, and what llama.cpp
# rounds to 8 bits beside them, move the demo's by 0.1 and 0.2 (root mean square; docs/gguf.md).
CLOSE = {"q8_0": 0.3}
SENTENCE = "An adapter of kilobytes, swapped in milliseconds."
# Weights, activations, and the largest difference of an embedding from PEFT's, relative to its scale; int8
# drifts by the format.
ENCODERS = (
    ("fp32", "float", 1e-4),
    ("int8", "float", 0.1),
    ("int8", "dynamic", 0.2),
    ("int8", "static", 0.2),
)


def main(environments: Path) -> int:
    """Print a line for each folder and consumer; 1 when any of them differs."""
    optimum = [str(environments / "optimum" / "bin" / "python"), str(HERE / "with_optimum.py")]
    script = ["node", str(environments / "node" / "with_transformers_js.mjs")]
    decoders = [
        [sys.executable, str(HERE / f"with_{name}.py")] for name in ("vera_edge", "onnxruntime", "genai")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        failed = _decoders([*decoders, optimum, script], Path(temporary))
        failed |= _encoders([optimum, script], Path(temporary))
        failed |= _in_a_browser(decoders[0], environments / "node", Path(temporary))
        failed |= _llama([decoders[0], decoders[2]], environments.parent / "llama-cpp", Path(temporary))
    return int(failed)


def _decoders(commands: list[list[str]], work: Path) -> bool:
    demo, failed = prepare_demo.prepare(), False
    for mode in ("merged", "branch"):
        folder = work / f"decoder-{mode}"
        made = target.export(demo.base, [(demo.adapter, 1.0)], folder, mode=mode, weights="int8")
        failed |= _compare(folder.name, commands, [str(folder), PROMPT, str(COUNT)])
        for name, file in made.adapters.items():
            frozen_graph.freeze(folder, name, file.stem)  # for Transformers.js
            words = [str(folder), PROMPT, str(COUNT), str(file)]
            failed |= _compare(f"{folder.name}, adapter {name}", commands, words)
    return failed


def _in_a_browser(ours: list[str], node: Path, work: Path) -> bool:
    """The same text in Chromium, whose ONNX Runtime has no `GatherBlockQuantized`: embeddings in float16."""
    if with_browser.installed() is None:
        print("no Chromium is installed; nothing was opened in a browser")
        return False
    demo, failed = prepare_demo.prepare(), False
    browser = [sys.executable, str(HERE / "with_browser.py"), str(node)]
    for mode in ("merged", "branch"):
        folder = work / f"browser-{mode}"
        ends = {"head": "fp16"}
        adapters = [(demo.adapter, 1.0)]
        made = target.export(demo.base, adapters, folder, mode=mode, weights="int8", options=ends)
        failed |= _compare(folder.name, [ours, browser], [str(folder), PROMPT, str(COUNT)])
        for name, file in made.adapters.items():
            frozen_graph.freeze(folder, name, file.stem)
            words = [str(folder), PROMPT, str(COUNT), str(file)]
            failed |= _compare(f"{folder.name}, adapter {name}", [ours, browser], words)
    return failed


def _llama(consumers: list[list[str]], environment: Path, work: Path) -> bool:
    """GGUF files in llama.cpp, and float32 ONNX in `consumers`, against the model as trained in torch."""
    demo, failed = prepare_demo.prepare(), False
    python = str(bench_llama_cpp.environment(environment))
    llama = [python, str(HERE / "with_llama.py")]
    onnx = work / "onnx-fp32"
    target.export(demo.base, [(demo.adapter, 1.0)], onnx, weights="fp32")
    for command in consumers:
        failed |= _continues([*command, str(onnx)], onnx.name, demo.adapter)
    for mode, weights in (("merged", "fp16"), ("merged", "q8_0"), ("branch", "fp16")):
        folder = work / f"gguf-{mode}-{weights}"
        made = target.export(
            demo.base, [(demo.adapter, 1.0)], folder, target="gguf", mode=mode, weights=weights
        )
        files = [str(file) for file in made.adapters.values()]
        close = CLOSE.get(weights, 0.0)
        failed |= _continues([*llama, str(folder)], folder.name, demo.adapter, files, close)
    return failed | _llama_server(python, work)


def _continues(
    command: list[str], what: str, adapter: Path, files: Sequence[str] = (), close: float = 0.0
) -> bool:
    """Whether a consumer goes on with some prompt as the model as trained doesn't.

    close: it may where its token is no more than so many of torch's logits behind; after it texts differ.
    """
    failed = False
    for prompt in PROMPTS:
        one = _run([*command, prompt, str(COUNT), *files])
        found, said = one["text"].removeprefix(prompt), "the same text as torch"
        if found != _greedy(adapter, prompt):
            at, behind = _parting(adapter, prompt, one.get("tokens", []))
            failed |= behind > close
            said = f"{found!r}: parts from torch's after {at} tokens, by {behind:.2f} logits of torch's"
        print(f"{what}, {one['consumer']}: {said}")
    return failed


def _llama_server(python: str, work: Path) -> bool:
    """Two adapters of one base, of two methods, swapped by requests to llama.cpp's server."""
    demo = prepare_demo.prepare()
    trained = (demo.adapter, lora_training.FOLDER / "qlora-nf4")
    folder, pairs = work / "gguf-two", [(path, 1.0) for path in trained]
    made = target.export(demo.base, pairs, folder, target="gguf", mode="branch", weights="fp16")
    files = [str(file) for file in made.adapters.values()]
    one = _run([python, str(HERE / "with_llama_server.py"), str(folder), PROMPT, str(COUNT), *files])
    first, second = (_greedy(path, PROMPT) for path in trained)
    same = one["texts"] == [first, second, first] and first != second
    said = "the same texts as torch, swapped and swapped back" if same else repr(one["texts"])
    print(f"{folder.name}, {one['consumer']}: {said}")
    return not same


@cache
def _reference(adapter: Path) -> OpenedReference:
    """The model as trained with `adapter`, in torch."""
    return open_trained(adapter, prepare_demo.prepare().base)


@cache
def _continuation(adapter: Path, prompt: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and those that the model as trained goes on with."""
    reference = _reference(adapter)
    assert reference.tokenizer is not None
    given, found = reference.tokenizer.encode(prompt).ids, list[int]()
    for _ in range(COUNT):
        found.append(int(reference.runner.logits(np.array([*given, *found]))[-1].argmax()))
    return given, found


def _greedy(adapter: Path, prompt: str) -> str:
    """The model as trained with `adapter` goes on with the prompt, in torch."""
    tokenizer = _reference(adapter).tokenizer
    assert tokenizer is not None
    return str(tokenizer.decode(_continuation(adapter, prompt)[1]))


def _parting(adapter: Path, prompt: str, tokens: Sequence[int]) -> tuple[int, float]:
    """After how many tokens others than torch's follow, and how far behind its own torch has the first."""
    given, wanted = _continuation(adapter, prompt)
    at = next((at for at, pair in enumerate(zip(tokens, wanted, strict=False)) if pair[0] != pair[1]), None)
    if at is None:  # it ended, or says no tokens
        return min(len(tokens), COUNT), float("inf")
    logits = _reference(adapter).runner.logits(np.array([*given, *wanted[:at]]))[-1]
    return at, float(logits[wanted[at]] - logits[tokens[at]])


def _compare(what: str, commands: list[list[str]], words: list[str]) -> bool:
    """Run them all; whether one says something else than the first, or renders a chat otherwise."""
    found = [_run([*command, *words]) for command in commands]
    print(f"{what}: {found[0]['text']!r}")
    for one in found:
        same = one["text"] == found[0]["text"]
        print(f"  {one['consumer']}: {'the same text' if same else one['text']!r}")
    chat = BundleText(Path(words[0])).render([{"role": "user", "content": words[1]}])
    return any(one["text"] != found[0]["text"] or one.get("chat", chat) != chat for one in found)


def _encoders(commands: list[list[str]], work: Path) -> bool:
    demo, failed = demo_encoder.prepare(), False
    truth = _embedding(demo)
    for weights, activations, limit in ENCODERS:
        folder, options = work / f"encoder-{weights}-{activations}", {"activations": activations}
        target.export(demo.base, [(demo.adapter, 1.0)], folder, weights=weights, options=options)
        for command in commands:
            one = _run([*command, str(folder), SENTENCE, "--embed"])
            error = float(np.abs(np.array(one["embedding"]) - truth).max() / np.abs(truth).max())
            failed |= not error < limit
            print(f"{folder.name}, {one['consumer']}: {error:.1e} from PEFT's embedding, limit {limit:g}")
    return failed


def _embedding(demo: demo_encoder.DemoEncoder) -> Any:
    """PEFT's own: the mean of the last hidden states, (hidden,)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(demo.base), demo.adapter).eval()
    inputs = AutoTokenizer.from_pretrained(demo.base)(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0].mean(dim=0).numpy()


def _run(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{run.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
