"""A release of many adapters over one base, against what its parts take alone; and `verify` against the hash.

    scripts/bench_release [--adapters 1 8 20] [--weights nf4] [--tokens 128] [--golden] [--out FOLDER]

The base is the demo's, the adapters its adapter with vectors moved by seeded noise. Every figure is the wall
time of a process of its own, from its start to its end, but for the stages of a release, which it counts
itself. Drift and golden vectors are measurements of each adapter, by the model as trained in torch: neither
the base's export nor a pack, they are told apart, and the rest is held to the bound.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from scripts.prepare_demo import Demo, prepare
from vera_edge.releasing.run import release

RECIPE = """\
[release]
name = "bench"
golden = {golden}
[[base]]
id = "base"
path = "{base}"
{adapters}[[variant]]
mode = "branch"
weights = "{weights}"
[limits]
data = "{data}"
tokens = {tokens}
window = {window}
"""
ADAPTER = '[[adapter]]\nid = "{name}"\nbase = "base"\npath = "{name}"\n'
WEIGHTS_NAME = "adapter_model.safetensors"
NAME = "a{:02}"
MEASURING = ("drift", "golden")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 20])
    parser.add_argument("--weights", default="nf4")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--golden", action="store_true", help="Make golden vectors too; about a minute each.")
    parser.add_argument("--out", type=Path, help="Keep what is made in this folder.")
    words = parser.parse_args()
    demo = prepare()
    with _folder(words.out) as folder:
        make_adapters(folder, demo, max(words.adapters))
        parts = Parts(folder, demo, words.weights)
        found = []
        for count in words.adapters:
            recipe = write_recipe(folder, demo, count, words.weights, words.tokens, words.golden)
            parts.measure()
            found.append(_releases(folder / str(count), recipe, count))
        parts.measure()
        export, pack = parts.medians()
        for one in found:
            one.show(export, pack)
        _verify(folder / str(count) / "out" / "a00" / f"onnx-branch-{words.weights}")


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        yield kept


def make_adapters(folder: Path, demo: Demo, count: int) -> None:
    """The demo's adapter `count` times in `folder`, each with vectors of its own."""
    for number in range(count):
        place = folder / NAME.format(number)
        shutil.copytree(demo.adapter, place)
        vectors = load_file(place / WEIGHTS_NAME)
        rng = np.random.default_rng(number)
        for key, value in vectors.items():
            if "vera_lambda" in key:
                noise = rng.standard_normal(value.shape).astype(value.dtype)
                vectors[key] = value + np.float32(0.05) * np.abs(value).mean() * noise
        save_file(vectors, place / WEIGHTS_NAME, {"format": "pt"})


def write_recipe(folder: Path, demo: Demo, count: int, weights: str, tokens: int, golden: bool) -> Path:
    """A recipe of the first `count` adapters in `folder`."""
    adapters = "".join(ADAPTER.format(name=NAME.format(number)) for number in range(count))
    recipe = folder / f"release-{count}.toml"
    facts = {
        "base": demo.base,
        "weights": weights,
        "data": demo.eval_text,
        "tokens": tokens,
        "window": max(16, tokens // 8),  # fewer than eight windows decide nothing, and the gate would say so
        "golden": str(golden).lower(),
    }
    recipe.write_text(RECIPE.format(adapters=adapters, **facts))
    return recipe


def _command(*words: object) -> float:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "vera_edge", *(str(word) for word in words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


@dataclass
class Parts:
    """Seconds of the base's own export with an adapter, and of one adapter's pack.

    Measured before, between and after the releases: a machine isn't equally quick all the time.
    """

    folder: Path
    demo: Demo
    weights: str
    exports: list[float] = field(default_factory=list)
    packs: list[float] = field(default_factory=list)

    def measure(self) -> None:
        words = ("--mode", "branch", "--weights", self.weights, "-q", "--force")
        alone, first = self.folder / "alone", self.folder / NAME.format(0)
        self.exports.append(_command("export", self.demo.base, first, "-o", alone, *words))
        packed = self.folder / "packed.onnx_adapter"
        for _ in range(3):
            self.packs.append(_command("adapter", "pack", first, "--for", alone, "-o", packed, "--force"))

    def medians(self) -> tuple[float, float]:
        for what, seconds in (("export of the base with one adapter", self.exports), ("pack", self.packs)):
            listed = " ".join(f"{one:.2f}" for one in seconds)
            print(f"{what:<38}{np.median(seconds):7.2f} s, the median of {listed}")
        return float(np.median(self.exports)), float(np.median(self.packs))


@dataclass(frozen=True)
class Found:
    """Seconds of a release of `count` adapters, by stage and in all; of the same again; bytes on the disk."""

    count: int
    spent: Mapping[str, float]
    total: float
    again: float
    size: int

    def show(self, export: float, pack: float) -> None:
        count, own = self.count, self.total - sum(self.spent.get(stage, 0.0) for stage in MEASURING)
        print(f"release of {count}")
        for stage, seconds in self.spent.items():
            print(f"  {stage:<36}{seconds:7.1f} s, {seconds / count:.2f} s each")
        print(f"  all of it                           {self.total:7.1f} s")
        print(f"  without measuring                   {own:7.1f} s")
        print(f"  of an export and the packs          {own / (export + count * pack):7.2f}")
        print(f"  of 1.5 exports and the packs        {own / (1.5 * export + count * pack):7.2f}")
        print(f"  the same again, nothing changed     {self.again:7.2f} s")
        print(f"  out and store on the disk           {self.size / 1e6:7.0f} MB")


def _release(recipe: Path, out: Path, store: Path) -> dict[str, float]:
    """Seconds that the bundles of a release took, by stage."""
    spent: dict[str, float] = defaultdict(float)
    for result in release(recipe, out, store=store).results:
        assert result.state == "built", result.message
        for stage, seconds in result.seconds.items():
            spent[stage] += seconds
    return spent


def _releases(folder: Path, recipe: Path, count: int) -> Found:
    out, store = folder / "out", folder / "store"
    begun = time.perf_counter()
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        spent = other.submit(_release, recipe, out, store).result()
    total = time.perf_counter() - begun
    again = _command("release", recipe, "-o", out, "--store", store, "-q")
    files = [path for place in (out, store) for path in place.rglob("*") if path.is_file()]
    once = {path.stat().st_ino: path.stat().st_size for path in files}
    return Found(count, spent, total, again, sum(once.values()))


def _verify(bundle: Path) -> None:
    """`verify` beside one thread's SHA-256 of the same bytes, in one process, both from the page cache."""
    from vera_edge.bundle import contents as bundles

    files = [path for path in bundle.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    held = [path.read_bytes() for path in files]
    rounds: dict[str, list[float]] = {"hash": [], "verify": []}
    for _ in range(7):
        begun = time.perf_counter()
        for data in held:
            hashlib.sha256(data).hexdigest()
        rounds["hash"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        bundles.verify(bundle)
        rounds["verify"].append(time.perf_counter() - begun)
    hashing, verifying = (size / float(np.median(rounds[name])) / 1e6 for name in ("hash", "verify"))
    print(f"SHA-256 of {size / 1e6:.0f} MB in memory             {hashing:7.0f} MB/s")
    print(f"verify of them on disk                {verifying:7.0f} MB/s, {verifying / hashing:.2f} of it")


if __name__ == "__main__":
    main()
