"""What each way of requantizing costs: bits, time, and drift from the model as trained.

    nice -n 5 python scripts/bench_requantize.py BASE ADAPTER --calibration FILE --data FILE [--data FILE]...
        [--tokens 10240] [--scored 2048] [--only NAME]... [--json]

Drift is the mean KL divergence (nats) of exact float32 values: the rounding's alone, and no runtime's.
Bits count scales and zero points as the format stores them. One pass over the text for each way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vera_edge import merging
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Float32, Int64
from vera_edge.reference.calibration import Sees
from vera_edge.reference.model import load_dense, oriented
from vera_edge.requantize import EFFORTS, CodesFolder, Effort, Grid, bnb_grid, int8_rows, int_blocks
from vera_edge.rounding.writeback import Calibration, Recovered, write_back
from vera_edge.text import windows

NF4, INT4, INT2 = bnb_grid("nf4"), *(int_blocks(bits, 32, symmetric=False) for bits in (4, 2))


@dataclass(frozen=True)
class Way:
    """One row of the table. `bits`: a weight's, scales and zero points included.

    own_tokens: calibrate on as many as the effort takes, and not on --tokens.
    """

    name: str
    grid: Grid
    bits: float
    method: str = "gptq"
    merged: bool = True
    sees: Sees = "inputs"
    follow: float = 1.0
    recover: tuple[str, ...] = ()
    effort: Effort = field(default_factory=Effort)
    own_tokens: bool = False


NF4_BITS, INT4_BITS, INT2_BITS = 4 + 8 / 64 + 32 / 64 / 256, 4 + 32 / 32 + 4 / 32, 2 + 1 + 2 / 32
WAYS = (
    *(Way(f"nf4, {method}", NF4, NF4_BITS, method) for method in ("rtn", "search", "hqq", "gptq")),
    *(
        Way(f"{name}, effort {effort}", grid, bits, effort=Effort.named(effort), own_tokens=True)
        for name, grid, bits in (("nf4", NF4, NF4_BITS), ("int4 blocks", INT4, INT4_BITS))
        for effort in EFFORTS
    ),
    Way("nf4, gptq without descent", NF4, NF4_BITS, effort=Effort(rounds=0)),
    Way("nf4, gptq, act-order", NF4, NF4_BITS, effort=Effort(act_order=True)),
    Way("nf4, gptq, damping 0.001", NF4, NF4_BITS, effort=Effort(damp=0.001)),
    Way("nf4, gptq, damping 0.1", NF4, NF4_BITS, effort=Effort(damp=0.1)),
    Way("nf4, gptq, layers alone", NF4, NF4_BITS, sees="original", follow=0.0),
    Way("nf4, gptq, later layers see it", NF4, NF4_BITS, follow=0.0),
    Way("nf4, gptq, later layers follow by half", NF4, NF4_BITS, follow=0.5),
    Way("nf4 with float32 absmax, gptq", bnb_grid("nf4", double_quant=False), 4.5),
    Way("int4 blocks, rtn", INT4, INT4_BITS, "rtn"),
    Way("int4 blocks, gptq", INT4, INT4_BITS),
    Way("int4 blocks, gptq, layers alone", INT4, INT4_BITS, sees="original", follow=0.0),
    Way("int4 blocks, rtn, branch", INT4, INT4_BITS, "rtn", merged=False),
    Way("int4 blocks, gptq, branch", INT4, INT4_BITS, merged=False),
    Way(
        "int4 blocks, gptq, branch, refitted",
        INT4,
        INT4_BITS,
        merged=False,
        recover=("lambda_b", "lambda_d"),
    ),
    Way("int4 blocks, gptq, bias", INT4, INT4_BITS, recover=("bias",)),
    *(
        Way(f"int4 blocks, gptq, low-rank {rank}", INT4, INT4_BITS, recover=(f"low-rank={rank}",))
        for rank in (8, 32)
    ),
    Way("int2 blocks, gptq, low-rank 32", INT2, INT2_BITS, recover=("low-rank=32",)),
    Way("int2 blocks, gptq, low-rank 32 and bias", INT2, INT2_BITS, recover=("low-rank=32", "bias")),
    Way("int8 blocks, rtn", int_blocks(8, 32), 9, "rtn"),
    Way("int8 rows, rtn", int8_rows(), 8, "rtn"),
    Way("int2 blocks, gptq", INT2, INT2_BITS),
)


class Bench:
    """The model as trained, its answers on each text, and a model of the same shape to put weights in."""

    def __init__(self, ready: merging.Prepared, texts: Sequence[str], scored: int) -> None:
        self.ready = ready
        self.model = load_dense(ready.model.checkpoint).eval()
        self.base = self._weights()
        self.modules = [step.module for step in ready.plan.steps if step.action == "merge"]
        self.deltas = {name: self._merged(name) - self.base[name] for name in self.modules}
        self.texts = {text: cut(ready, text, scored).tokens for text in texts}
        self._set({name: self._merged(name) for name in self.modules})
        self.truth = {text: [self._log(window) for window in found] for text, found in self.texts.items()}
        self._set(self.base)
        self.effect = self.drift()

    def _weights(self) -> dict[str, torch.Tensor]:
        names = [step.module for step in self.ready.plan.steps if step.action == "merge"]
        return {name: self.model.get_submodule(name).weight.data.clone() for name in names}

    def _merged(self, module: str) -> torch.Tensor:
        ready = self.ready
        weight = merging.merged_weight(ready.model, module)
        return oriented(ready.model.checkpoint, module, weight)

    def _delta(self, module: str, refitted: Mapping[str, LambdaVectors]) -> torch.Tensor:
        if module not in refitted:
            return self.deltas[module]
        found, inside = refitted[module], self.ready.model.checkpoint.linears[module].in_features
        assert self.ready.model.projections is not None
        delta = self.ready.model.projections.delta(found.lambda_b, found.lambda_d, inside)
        return oriented(
            self.ready.model.checkpoint, module, np.float32(self.ready.model.adapters[0][1]) * delta
        )

    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.model.get_submodule(name).weight.data = weight

    def _term(self, module: str, won: Recovered) -> torch.Tensor | float:
        term = won.corrections[module].weight if module in won.corrections else None
        return 0.0 if term is None else oriented(self.ready.model.checkpoint, module, term)

    def _set_biases(self, biases: Mapping[str, Float32 | None]) -> None:
        """Biases beside linears that have none; None: without again."""
        for name, bias in biases.items():
            own = None if bias is None else torch.nn.Parameter(torch.from_numpy(bias), requires_grad=False)
            self.model.get_submodule(name).bias = own

    def _more_bits(self, won: Recovered) -> float:
        """Bits a weight that the low-rank terms take in float16."""
        stored = sum(
            16 * (one.up.size + one.down.size)
            for one in won.corrections.values()
            if one.up is not None and one.down is not None
        )
        return stored / sum(weight.numel() for weight in self.base.values())

    def _log(self, window: Int64) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(self.model(input_ids=torch.from_numpy(window[None])).logits[0], -1)

    def drift(self) -> dict[str, tuple[float, float]]:
        """Mean KL and top-1 agreement on each text."""
        found = {}
        for text, tokens in self.texts.items():
            total, same, count = 0.0, 0, 0
            for window, truth in zip(tokens, self.truth[text], strict=True):
                ours = self._log(window)
                total += float((truth.exp() * (truth - ours)).sum())
                same += int((truth.argmax(-1) == ours.argmax(-1)).sum())
                count += len(window)
            found[text] = (total / count, same / count)
        return found

    def run(self, way: Way, calibration: Sequence[Int64]) -> dict[str, Any]:
        began, cpu = time.perf_counter(), time.process_time()
        ready = self.ready
        with tempfile.TemporaryDirectory() as folder:
            store = CodesFolder(Path(folder))
            how = Calibration(calibration, way.method, way.sees, way.follow, way.effort, way.recover)
            grids = dict.fromkeys(self.modules, way.grid)
            won = write_back(ready.model, grids, how, store.put, merged=way.merged)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            weights = {
                name: oriented(ready.model.checkpoint, name, store[name].dequantize())
                for name in self.modules
            }
        if not way.merged:
            weights = {name: weight + self._delta(name, won.vectors) for name, weight in weights.items()}
        self._set({name: weight + self._term(name, won) for name, weight in weights.items()})
        self._set_biases({name: found.bias for name, found in won.corrections.items()})
        drift = {
            text: {"kl": kl, "of_effect": kl / self.effect[text][0], "top1": top1}
            for text, (kl, top1) in self.drift().items()
        }
        self._set_biases(dict.fromkeys(won.corrections))
        bits = way.bits + self._more_bits(won)
        return {"way": way.name, "bits": bits, "seconds": seconds, "cpu": cpu, "drift": drift}


def cut(ready: merging.Prepared, text: str, tokens: int) -> windows.Windows:
    checkpoint = ready.model.checkpoint
    tokenizer = windows.open_tokenizer(checkpoint.path)
    return windows.make(windows.read_text(text), tokenizer, int(checkpoint.config["vocab_size"]), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--scored", type=int, default=2048)
    parser.add_argument("--only", action="append", help="names of ways; all unless given")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    ready = merging.prepare(asked.base, [(asked.adapter, 1.0)])
    bench = Bench(ready, asked.data, asked.scored)
    calibration = cut(ready, asked.calibration, asked.tokens).tokens
    if not asked.json:
        print("effect", {text: round(kl, 4) for text, (kl, _) in bench.effect.items()})
    for way in WAYS:
        if asked.only and way.name not in asked.only:
            continue
        own = cut(ready, asked.calibration, way.effort.tokens).tokens if way.own_tokens else calibration
        found = bench.run(way, own)
        if asked.json:
            print(json.dumps(found), flush=True)
            continue
        shares = " ".join(
            f"{part['kl']:.4f} {part['of_effect']:.4f} {part['top1']:.3f} |"
            for part in found["drift"].values()
        )
        times = f"{found['seconds']:.0f} s, {found['cpu']:.0f} s CPU"
        print(f"{way.name:42} {found['bits']:5.2f} | {shares} {times}", flush=True)


if __name__ == "__main__":
    main()
