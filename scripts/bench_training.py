"""What training on the integers that are shipped gives, beside training on NF4, at equal steps.

    scripts/bench_training [--steps 48] [--tokens 2048] [--seed N ...] [--folder DIR]

The demo's training, cut short: the same seed, text and steps, once on the NF4 base, on the integers of
`quantize --to gptq` as they are, and on these with activations rounded as ONNX Runtime does. Each adapter is
exported as a branch beside int4 in blocks of 32, that of the integers once more with a head that reads 16
bits, and measured in ONNX Runtime against what it was trained as, on text that no training and no
calibration saw. The NF4 adapter's integers are rounded from the NF4 base; it is measured as it came and as
`adapt` carries it over. At the demo's own number of steps it is the demo's. --seed: rows of other seeds, on
the integers.

What is made stays in the folder (by default in the cache), so that a run that was broken off goes on.
Writes its table into docs/training.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vera_edge
from scripts import demo_training
from scripts.bench_turns import say, write_section
from scripts.prepare_demo import ROOT, Demo, cache_folder, prepare
from vera_edge.storage.files import staged_folder, write_atomic
from vera_edge.storage.json_text import canonical_json
from vera_edge.training import load

PAGE = ROOT / "docs" / "training.md"
GROUP = 32
ENOUGH = 4  # windows, for an interval that says something
CARRYING = 40  # steps of `adapt`
Loads = Callable[[Path], Any]


@dataclass(frozen=True)
class Way:
    """One row. trained: the base that the adapter learns beside; shipped: the integers it's exported with.

    adapter: its name in the folder. load: gives the model of `trained`. carried: whether `adapt` carries the
    NF4 adapter over to `shipped`, and nothing else is trained. head: what the export's head reads. seed: of
    the projections; None: the demo's.
    """

    name: str
    adapter: str
    trained: Path
    shipped: Path
    load: Loads = load
    carried: bool = False
    head: str | None = None
    seed: int | None = None

    @property
    def key(self) -> str:
        """Its name among the files that are kept."""
        return self.own_adapter if self.head is None else f"{self.own_adapter}-{self.head}"

    @property
    def own_adapter(self) -> str:
        """The name of its adapter and seed."""
        return self.adapter if self.seed is None else f"{self.adapter}-seed-{self.seed}"


@dataclass(frozen=True)
class Text:
    """What was found on one text. kl, effect: mean KL in nats from the model as trained.

    low, high: 95 % of `kl / effect`. trained, shipped, bare: perplexities of the model as trained, of the
    export, and of the trained base without the adapter.
    """

    tokens: int
    windows: int
    kl: float
    effect: float
    low: float
    high: float
    trained: float
    shipped: float
    bare: float


@dataclass(frozen=True)
class Row:
    """A way's figures on text like the adapter's, and on code."""

    name: str
    like: Text
    code: Text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=48, help="of training, a window of 256 tokens each")
    parser.add_argument(
        "--tokens",
        type=int,
        default=2048,
        help="about how many tokens to measure on, and half as many of code",
    )
    parser.add_argument(
        "--seed", type=int, action="append", default=[], help="a further one; repeat for more"
    )
    parser.add_argument("--folder", type=Path, default=cache_folder() / "bench-training")
    given = parser.parse_args()
    demo, recipe = prepare(), replace(demo_training.Recipe(), steps=given.steps)
    given.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(demo, given.folder, recipe, given.tokens)
    rows = [bench.row(way) for way in bench.ways(given.seed)]
    lines = [*table(rows), "", conditions(recipe, rows[0])]
    say("\n".join(lines))
    write_section("training", lines, PAGE)


@dataclass(frozen=True)
class Bench:
    """Everything that is made, in `folder`."""

    demo: Demo
    folder: Path
    recipe: demo_training.Recipe
    tokens: int

    def ways(self, seeds: Sequence[int]) -> Sequence[Way]:
        """The rows, in the order of the table; seeds: further ones for the integers."""
        own = self._integers("integers", self.demo.float_base)
        of_nf4 = self._integers("integers-of-nf4", self.demo.base)
        nf4 = Way("NF4", "nf4", self.demo.base, of_nf4, demo_training.load_in_floats)
        rounding = partial(load, activations="int8")
        integers = Way("integers", "integers", own, own)
        wide = replace(integers, name="integers, exported with `--head-activations int16`", head="int16")
        others = (
            replace(way, name=f"{way.name}, seed {seed}", seed=seed)
            for seed in seeds
            for way in (integers, wide)
        )
        return (
            nf4,
            replace(nf4, name="NF4, then carried over by `adapt`", adapter="carried", carried=True),
            integers,
            wide,
            Way('integers, `activations="int8"`', "int8", own, own, rounding),
            *others,
        )

    def row(self, way: Way) -> Row:
        """A way's figures, kept in a file."""
        path = self.folder / f"row-{way.key}-{self.recipe.steps}-{self.tokens}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            return Row(way.name, Text(**kept["like"]), Text(**kept["code"]))
        adapter, bundle = self._adapter(way), self.folder / f"bundle-{way.key}-{self.recipe.steps}"
        if not bundle.exists():
            say(f"{bundle.name}: exporting")
            vera_edge.export(
                way.shipped,
                adapter,
                out=bundle,
                mode="branch",
                weights="same",
                head_activations=way.head,
            )
        # What was carried over is held against what it was before.
        truth = self._trained("nf4") if way.carried else adapter
        texts = {self.demo.eval_text: self.tokens, self.demo.code_text: self.tokens // 2}
        found = (self._measured(way, truth, bundle, text, tokens) for text, tokens in texts.items())
        row = Row(way.name, *found)
        say(f"{way.name}: {row}")
        write_atomic(path, canonical_json(asdict(row)))
        return row

    def _integers(self, name: str, base: Path) -> Path:
        out = self.folder / name
        if not out.exists():
            say(f"{name}: rounding")
            vera_edge.quantize(base, out=out, to="gptq", group=GROUP, calibration=self.demo.train_text)
        return out

    def _trained(self, name: str) -> Path:
        if name == "nf4" and self.recipe == demo_training.Recipe():
            return self.demo.adapter
        return self.folder / f"adapter-{name}-{self.recipe.steps}"

    def _adapter(self, way: Way) -> Path:
        out = self._trained(way.own_adapter)
        if out.exists():
            return out
        if way.carried:
            say(f"{out.name}: carrying it over")
            made = vera_edge.adapt(
                way.trained,
                self._trained("nf4"),
                onto=way.shipped,
                out=out,
                calibration=self.demo.train_text,
                steps=CARRYING,
                activations="int8",
            )
            say(made)
            return out
        say(f"{out.name}: training")
        with staged_folder(out, force=False) as stage:
            recipe = self.recipe if way.seed is None else replace(self.recipe, seed=way.seed)
            demo_training.train(way.trained, stage, recipe, _progress, way.load)
        return out

    def _measured(self, way: Way, truth: Path, bundle: Path, text: Path, tokens: int) -> Text:
        found = vera_edge.drift(truth, bundle, base=way.trained, data=text, tokens=tokens)
        assert isinstance(found, vera_edge.DriftReport)
        assert found.effect is not None and found.retained is not None
        return Text(
            tokens=found.fidelity.tokens,
            windows=found.fidelity.windows,
            kl=found.fidelity.kl.mean.value,
            effect=found.effect.kl.mean.value,
            low=1 - found.retained.high,
            high=1 - found.retained.low,
            trained=found.fidelity.reference_perplexity.value,
            shipped=found.fidelity.perplexity.value,
            bare=found.effect.perplexity.value,
        )


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| trained on | effect | lost as shipped | perplexity as trained | as shipped "
        "| code: effect | lost as shipped | perplexity as trained | as shipped |",
        "|---|--:|---|--:|--:|--:|---|--:|--:|",
    ]
    for row in rows:
        cells = [cell for text in (row.like, row.code) for cell in _cells(text)]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    like, code = rows[0].like, rows[0].code
    nothing = ["*NF4 without an adapter*", "", "", f"{like.bare:.3f}", "", "", "", f"{code.bare:.3f}", ""]
    return [*lines, f"| {' | '.join(nothing)} |"]


def _cells(text: Text) -> list[str]:
    lost = f"{text.kl / text.effect:.1%}"
    if text.windows >= ENOUGH:
        lost += f" ({100 * text.low:.1f} to {100 * text.high:.1f})"
    return [f"{text.effect:.3f}", lost, f"{text.trained:.3f}", f"{text.shipped:.3f}"]


def conditions(recipe: demo_training.Recipe, row: Row) -> str:
    """What the table was measured on, and with what."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "onnxruntime")
    named = ", ".join(f"{name} {version(name)}" for name in packages)
    like, code = row.like, row.code
    return (
        f"SmolLM2-135M-Instruct; VeRA of rank {recipe.rank} on all seven linears, the demo's seed where none "
        f"is named, {recipe.steps} steps of {recipe.window} tokens; carried over in {CARRYING} at most. "
        f"Integers: 4 bits in blocks of {GROUP} with zero points (5.1 bits a weight), calibrated on training "
        "text and built-in text; from the floats, for the adapter of NF4 from the NF4 base. Effect and "
        f"losses: mean KL in nats from the model as trained, in exact float32, on {like.tokens} tokens of "
        f"held-out topics in {like.windows} windows and {code.tokens} of code in {code.windows}; in brackets "
        "95 % intervals over windows. As shipped: `export --mode branch --weights same`, projections and "
        "head in int8, in ONNX Runtime. "
        f"{named}."
    )


def _progress(what: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        say(f"  {what}: {done} of {total}")


if __name__ == "__main__":
    main()
