"""One artefact, its consumers: the same greedy text, the same embedding, in all of them.

Exports the demo's decoder (merged and as a side-branch, int8) and an encoder (float32, int8, and int8 with
int8 activations, dynamic and static), opens each folder in vera_edge, plain ONNX Runtime, ONNX Runtime GenAI,
Optimum and Transformers.js, the decoder with float16 ends in headless Chromium where that is installed, and
the model as GGUF in llama.cpp, and exits 1 when one says something else.
Run by scripts/test_consumers, which makes the environments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from scripts import bench_llama_cpp, demo_encoder, prepare_demo
from scripts.consumers import with_browser
from vera_edge.device.runtime.chat import BundleText
from vera_edge.exporting import frozen_graph, target
from vera_edge.measuring.opened_reference import open_trained

HERE = Path(__file__).resolve().parent / "consumers"
PROMPT, COUNT = "The for statement is used to", 24
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
        failed |= _llama(environments.parent / "llama-cpp", Path(temporary))
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


def _llama(environment: Path, work: Path) -> bool:
    """GGUF files in llama.cpp against the model as trained, in torch."""
    demo, failed = prepare_demo.prepare(), False
    command = [str(bench_llama_cpp.environment(environment)), str(HERE / "with_llama.py")]
    for mode, weights in (("merged", "fp16"), ("merged", "q8_0"), ("branch", "fp16")):
        folder = work / f"gguf-{mode}-{weights}"
        made = target.export(
            demo.base, [(demo.adapter, 1.0)], folder, target="gguf", mode=mode, weights=weights
        )
        files = [str(file) for file in made.adapters.values()]
        one = _run([*command, str(folder), PROMPT, str(COUNT), *files])
        wanted = _greedy(demo)
        failed |= one["text"] != wanted
        print(f"{folder.name}, llama.cpp: {'the same text' if one['text'] == wanted else one['text']!r}")
    return failed


@cache
def _greedy(demo: prepare_demo.Demo) -> str:
    """The model as trained goes on with the prompt, in torch."""
    reference = open_trained(demo.adapter, demo.base)
    assert reference.tokenizer is not None
    tokens = reference.tokenizer.encode(PROMPT).ids
    start = len(tokens)
    for _ in range(COUNT):
        tokens.append(int(reference.runner.logits(np.array(tokens))[-1].argmax()))
    return str(reference.tokenizer.decode(tokens[start:]))


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
