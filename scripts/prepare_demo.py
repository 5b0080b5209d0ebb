"""Make what the demo and the tests of the real model need: model, quantized bases, text, a trained adapter.

    python -m scripts.prepare_demo            prints the folder when all of it is there
    python -m scripts.prepare_demo --demo     makes only what scripts/demo takes
    python -m scripts.prepare_demo --train    trains the adapter, not taking that of examples/adapter

Everything lands in $VERA_EDGE_CACHE/demo (by default .cache/demo of the checkout). A step is done again only
when its inputs change: each leaves a stamp of them. A step writes to a temporary folder first, so that a
broken-off run leaves nothing half-made, and a lock keeps two runs from doing the same work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts import demo_model, demo_text, demo_training
from vera_edge.storage.files import sha256_file, staged_folder, write_atomic
from vera_edge.storage.json_text import canonical_json

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "examples" / "adapter"
FOR_TESTS = ("smollm2-gptq", "smollm2-bf16")  # what scripts/demo doesn't take


@dataclass(frozen=True)
class Demo:
    """Where the parts of the demo are."""

    folder: Path

    @property
    def float_base(self) -> Path:
        """SmolLM2-135M-Instruct as float32."""
        return self.folder / "smollm2"

    @property
    def base(self) -> Path:
        """The same model as bitsandbytes NF4, double quantized, float32 compute: what the adapter is for."""
        return self.folder / "smollm2-nf4"

    @property
    def gptq_base(self) -> Path:
        """The same as 4-bit integers in GPTQ's storage, groups of 32, rounded to nearest."""
        return self.folder / "smollm2-gptq"

    @property
    def bf16_base(self) -> Path:
        """The same in bfloat16."""
        return self.folder / "smollm2-bf16"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def train_text(self) -> Path:
        return self.folder / "text" / "train.txt"

    @property
    def calibration_text(self) -> Path:
        return self.folder / "text" / "calibration.txt"

    @property
    def eval_text(self) -> Path:
        return self.folder / "text" / "eval.txt"

    @property
    def code_text(self) -> Path:
        return self.folder / "text" / "code.txt"


@dataclass(frozen=True)
class Step:
    """One folder of the demo: what it is made from, and how."""

    name: str
    inputs: Mapping[str, Any]
    make: Callable[[Path], None]


def cache_folder() -> Path:
    """Where the demo and the environments are kept: $VERA_EDGE_CACHE, or .cache of the checkout."""
    return Path(os.environ.get("VERA_EDGE_CACHE") or ROOT / ".cache").resolve()


def prepare(train: bool = False, leave_out: Collection[str] = ()) -> Demo:
    """Make what is missing or out of date, in order.

    train: the adapter by training, which takes minutes. leave_out: the names of steps that aren't needed.
    """
    demo = Demo(cache_folder() / "demo")
    demo.folder.mkdir(parents=True, exist_ok=True)
    with _lock(demo.folder / ".lock"):
        for step in _steps(demo, train):
            if step.name not in leave_out:
                perform(step, demo.folder)
    return demo


def _steps(demo: Demo, train: bool) -> list[Step]:
    packages = {
        name: version(name).split("+")[0] for name in ("torch", "transformers", "peft", "bitsandbytes")
    }
    text = hashlib.sha256(repr(demo_text.split()).encode()).hexdigest()
    model = {"wheel": demo_model.WHEEL, "gguf": demo_model.GGUF_SHA256, "code": 1}
    nf4 = {**model, "nf4": demo_model.NF4, "bitsandbytes": packages["bitsandbytes"]}
    recipe = demo_training.Recipe()
    trained = {**nf4, **packages, "text": text, "recipe": asdict(recipe), "training_code": 1}

    def train_adapter(folder: Path) -> None:
        with working_in(demo.folder):  # so that the adapter names its base "smollm2-nf4", not a local path
            demo_training.train(Path(demo.base.name), folder, recipe, report)

    return [
        Step("smollm2", model, demo_model.write_float32),
        Step("smollm2-nf4", nf4, lambda folder: demo_model.write_nf4(demo.float_base, folder)),
        Step(
            "smollm2-gptq",
            {**model, "code": 1},
            lambda folder: demo_model.write_gptq(demo.float_base, folder),
        ),
        Step(
            "smollm2-bf16",
            {**model, "code": 1},
            lambda folder: demo_model.write_bf16(demo.float_base, folder),
        ),
        Step("text", {"text": text, "code": 1}, lambda f: demo_text.write(f, platform.python_version())),
        Step("adapter", trained, train_adapter) if train else Step("adapter", _shipped(), copy_adapter),
    ]


def _shipped() -> dict[str, str]:
    """The digests of the files of the adapter that comes with this repository."""
    return {path.name: sha256_file(path) for path in sorted(ADAPTER.iterdir())}


def copy_adapter(folder: Path) -> None:
    """Take the adapter that `scripts/demo_training.py` once gave."""
    for path in ADAPTER.iterdir():
        shutil.copyfile(path, folder / path.name)


def perform(step: Step, folder: Path) -> None:
    """Make a step's folder in `folder`, unless it's there and its inputs are the same."""
    target, stamp = folder / step.name, folder / ".stamps" / f"{step.name}.json"
    wanted = canonical_json(json.loads(json.dumps(step.inputs)))
    if target.is_dir() and stamp.is_file() and stamp.read_bytes() == wanted:
        return
    started = time.monotonic()
    _say(f"{step.name}: making it")
    stamp.unlink(missing_ok=True)
    with staged_folder(target, force=True) as stage:
        step.make(stage)
    write_atomic(stamp, wanted)
    _say(f"{step.name}: done in {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another run that prepares the same folder")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def report(what: str, done: int, total: int) -> None:
    """A line every 20 steps where output is kept, one line that counts where a person looks."""
    if sys.stderr.isatty():
        print(
            f"\r  {what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True
        )
    elif done % 20 == 0 or done == total:
        _say(f"{what}: {done} of {total}")


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def hush() -> None:
    """Keep the advice of the libraries below out of what a person reads; their errors still show."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # that a faster kernel isn't installed
    for package in ("peft", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=package)


if __name__ == "__main__":
    hush()
    unneeded = FOR_TESTS if "--demo" in sys.argv[1:] else ()
    print(prepare("--train" in sys.argv[1:], unneeded).folder)
