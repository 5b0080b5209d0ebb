"""The device part on the real model: the same text as ONNX Runtime GenAI, valid, small, quick to swap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.prepare_demo import Demo
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import golden_vectors, target

pytestmark = pytest.mark.real
PROMPT = "What is the capital of France?"
TOKENS = 24


@pytest.fixture(scope="module")
def bundle(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in int4 with the trained adapter as a side-branch, and golden vectors for two prompts."""
    out = tmp_path_factory.mktemp("device-real") / "int4"
    adapters = [(demo.adapter, 1.0)]
    target.export(demo.base, adapters, out, mode="branch", weights="int4")
    # int4 isn't near the NF4 base it was made of; the limits are those of a model that still works.
    limits = {"max_kl": 1.0, "min_top1": 0.6}
    golden_vectors.ask(out, demo.base, adapters, limits, (PROMPT, "List three colours."))
    return out


def genai_tokens(folder: Path, prompt: np.ndarray, adapter: Path | None) -> list[int]:
    """Greedy tokens by ONNX Runtime GenAI on the same folder."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), "x")
        generator.set_active_adapter(adapters, "x")
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


@pytest.mark.parametrize("adapter", ["default", None])
def test_greedy_tokens_are_those_of_onnxruntime_genai(bundle: Path, adapter: str | None) -> None:
    session = Session.open(bundle, adapter)
    generation = session.generate(PROMPT, max_tokens=TOKENS)
    text = "".join(generation)
    file = bundle / "adapters" / "default.onnx_adapter"
    expected = genai_tokens(bundle, generation.prompt, file if adapter else None)
    ended = [token for token in expected if token not in session.decoder.ends]
    assert generation.tokens == ended
    assert text == session.text.text(ended) and len(text) > 10


def test_prompt_and_text_are_those_of_transformers(bundle: Path, demo: Demo) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.float_base)
    session = Session.open(bundle)
    messages = [{"role": "user", "content": PROMPT}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert session.text.render(messages) == rendered
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert session.text.prompt(PROMPT).tolist() == list(expected)
    sample = demo.eval_text.read_text(encoding="utf-8")[:3000] + " naïve 日本語 🙂"
    tokens = session.text.tokens(sample)
    assert tokens.tolist() == tokenizer(sample)["input_ids"]
    assert session.text.text(tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_it_validates_within_400_megabytes(bundle: Path) -> None:
    words = ["validate", str(bundle), "--max-memory", "400MB", "--json"]
    code = (
        "import resource, sys\n"
        "limit = 3 << 29\n"  # 1.5 GiB of addresses: mapped files and thread stacks count too
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "from vera_edge.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["passed"], found["checks"]
    assert 0 < found["peak_rss"] < 400e6
    assert {row["adapter"] for row in found["drift"]} == {None, "default"}
