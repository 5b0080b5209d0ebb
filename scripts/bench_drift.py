"""Measure the README's table: every way to ship the demo's adapter, against the model as trained.

    scripts/bench_drift [--tokens 4096] [--only NAME ...]

Writes docs/drift-table.md and the same table between the markers in README.md. All rows are measured on the
same windows of the demo's held-out text, against logits the reference gave once. Speed is greedy decoding
of 64 tokens, the best of three; it belongs to the machine named under the table.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.prepare_demo import ROOT, Demo, prepare
from vera_edge import adapter, merge, provenance, reference, target
from vera_edge.checkpoint import Checkpoint
from vera_edge.device.session import Session
from vera_edge.drift import evaluate, windows
from vera_edge.drift.models import folder_bytes
from vera_edge.target import Runner
from vera_edge.weight_rounding import Rounding, merge_to_folder

PAGE = ROOT / "docs" / "drift-table.md"
MARKS = ("<!-- drift-table: written by scripts/bench_drift -->", "<!-- end of drift-table -->")
EXPORTS = (
    ("fp32 merged", "merged", "fp32"),
    ("int8 merged", "merged", "int8"),
    ("int4 merged", "merged", "int4"),
    ("nf4 branch", "branch", "nf4"),
    ("int8 branch", "branch", "int8"),
    ("int4 branch", "branch", "int4"),
)
MERGED_NF4 = "nf4 merged back (vera-edge merge)"
PEFT = "PEFT merge_and_unload into NF4"
PROMPT = 'What does the Python reference say about "The "import" statement"?'
SPOKEN = 64  # tokens generated to measure speed


@dataclass
class Remembered:
    """A Runner that answers the same windows again from memory."""

    runner: Runner
    known: dict[bytes, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.runner.vocab_size

    def logits(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        key = tokens.tobytes()
        if key not in self.known:
            self.known[key] = self.runner.logits(tokens)
        return self.known[key]


@dataclass(frozen=True)
class Row:
    """One line of the table; `size` in bytes, None when it can't be written to disk.

    `speed` in tokens per second, None where no runtime of ours runs it.
    """

    name: str
    measured: evaluate.Measurement
    size: int | None
    speed: float | None


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tokens", type=int, default=4096, help="about how many tokens to measure on")
    options.add_argument("--only", nargs="*", help="these rows alone, shown and not written")
    chosen = options.parse_args()
    demo = prepare()
    checkpoint = Checkpoint.open(demo.base)
    trained = adapter.read(demo.adapter)
    projections = provenance.resolve(trained, checkpoint).projections
    model = reference.open_reference(checkpoint, [(trained, 1.0)], projections)
    as_trained, base = Remembered(model), Remembered(model.adapter_off())
    text = windows.make(
        windows.read_text(demo.eval_text), windows.open_tokenizer(demo.base), model.vocab_size, chosen.tokens
    )

    def judge(runner: Runner) -> evaluate.Measurement:
        return evaluate.measure(as_trained, runner, text, base=base)

    rows = list(_rows(demo, judge, chosen.only))
    table = render(rows, text.scored)
    print(table)
    if not chosen.only:
        write(table)


def _rows(
    demo: Demo, judge: Callable[[Runner], evaluate.Measurement], only: list[str] | None
) -> Iterable[Row]:
    out = demo.folder / "bench"
    for name, mode, weights in EXPORTS:
        if not only or name in only:
            _say(f"{name}: exporting and measuring")
            folder = out / name.replace(" ", "-")
            target.export(
                demo.base,
                [(demo.adapter, 1.0)],
                folder,
                mode=mode,
                weights=weights,
                force=True,
                rounding=Rounding(text=str(demo.calibration_text)),
            )
            session = Session.open(folder)
            yield Row(name, judge(session), folder_bytes(folder), _session_speed(session))
    if not only or MERGED_NF4 in only:
        _say(f"{MERGED_NF4}: merging and measuring")
        yield _merged_row(demo, judge, out / "merged-nf4")
    if not only or PEFT in only:
        _say(f"{PEFT}: merging and measuring")
        yield _peft_row(demo, judge, out / "peft-nf4")


def _session_speed(session: Session) -> float:
    """Tokens per second after the first token, best of three."""
    speeds = []
    for _ in range(3):
        generation = session.generate(PROMPT, max_tokens=SPOKEN)
        for _ in generation:
            pass
        speeds.append(float(generation.summary()["tokens_per_second"]))
    return max(speeds)


def _merged_row(demo: Demo, judge: Callable[[Runner], evaluate.Measurement], out: Path) -> Row:
    """Merged back into NF4 with compensated rounding; a Hugging Face folder, measured on its exact values."""
    ready = merge.prepare(demo.base, [(demo.adapter, 1.0)], "nf4")
    merge_to_folder(ready, out, Rounding(text=str(demo.calibration_text)), force=True)
    runner = reference.open_reference(Checkpoint.open(out))
    return Row(MERGED_NF4, judge(runner), folder_bytes(out), None)


def _peft_row(demo: Demo, judge: Callable[[Runner], evaluate.Measurement], out: Path) -> Row:
    """What PEFT itself makes of base and adapter: loaded fresh, merged before any forward."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.base, device_map="cpu", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, demo.adapter).merge_and_unload().eval()
    saved = copy.deepcopy(merged)  # bitsandbytes repacks a model in place at its first forward
    runner = reference.Reference(merged, int(merged.config.vocab_size), has_adapter=False)
    measured = judge(runner)
    tokenizer = AutoTokenizer.from_pretrained(demo.base)
    chat = [{"role": "user", "content": PROMPT}]
    asked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    speed = max(_torch_speed(merged, asked) for _ in range(2))
    return Row(PEFT, measured, _saved_size(saved, out), speed)


def _torch_speed(model: Any, asked: Any) -> float:
    started = time.monotonic()
    model.generate(**asked, max_new_tokens=1, do_sample=False)
    first = time.monotonic() - started
    started = time.monotonic()
    length = model.generate(**asked, max_new_tokens=SPOKEN // 4, do_sample=False).shape[1]
    return (length - asked["input_ids"].shape[1] - 1) / (time.monotonic() - started - first)


def _saved_size(model: Any, out: Path) -> int | None:
    try:
        model.save_pretrained(out)
    except NotImplementedError as cause:
        _say(f"{PEFT}: save_pretrained raises NotImplementedError {cause}")
        return None
    return folder_bytes(out)


def render(rows: Iterable[Row], scored: int) -> str:
    """The table and what one has to know to read it, as Markdown."""
    rows = list(rows)
    lines = [
        "| Way to ship | mean KL | of the effect | top-1 agreement | perplexity | on disk, MB | tokens/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        found, effect = row.measured.fidelity, row.measured.effect
        assert effect is not None
        share = found.kl.mean.value / effect.kl.mean.value
        size = f"{row.size / 1e6:.0f}" if row.size is not None else "can't be saved"
        speed = f"{row.speed:.0f}" if row.speed is not None else ""
        lines.append(
            f"| {row.name} | {found.kl.mean.value:.2g} | {share:.1%} | {found.same_top1.value:.1%} "
            f"| {found.perplexity.value:.3f} | {size} | {speed} |"
        )
    effect, found = rows[0].measured.effect, rows[0].measured.fidelity
    assert effect is not None
    lines.append(
        f"| *the base without the adapter* | {effect.kl.mean.value:.2g} | 100.0% "
        f"| {effect.same_top1.value:.1%} | {effect.perplexity.value:.3f} | | |"
    )
    return "\n".join([*lines, "", _footnote(scored, found.reference_perplexity.value), ""])


def _footnote(scored: int, perplexity: float) -> str:
    packages = ", ".join(f"{n} {version(n)}" for n in ("onnxruntime", "torch", "peft", "bitsandbytes"))
    note = (
        "SmolLM2-135M-Instruct in NF4 with a VeRA adapter of rank 256 on all seven linears; "
        f"{scored} tokens of held-out text. KL in nats, from the model as trained (NF4 base, exact values "
        f"in float32, adapter unmerged in PEFT; perplexity {perplexity:.3f}) to what is shipped; "
        "*of the effect* divides it by the KL to the base without the adapter. 4-bit weights of ours are "
        "rounded as the commands do by default, calibrated on text of the same kind that is in neither the "
        "training nor the measured text. Speed: greedy decoding on "
        f"{os.cpu_count()} cores of {_processor()} (load {os.getloadavg()[0]:.1f}); PEFT's row runs "
        f"in torch. {packages}."
    )
    return textwrap.fill(note, 110)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def write(table: str) -> None:
    """Put the table into docs/drift-table.md and between the marks in README.md."""
    PAGE.write_text(f"# Drift, size and speed of each way to ship\n\n{table}", encoding="utf-8")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{table}{MARKS[1]}{after}", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
