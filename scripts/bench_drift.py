"""Measure the drift tables: every way to ship the demo's adapter, against the model as trained.

    scripts/bench_drift [--tokens 4096] [--only NAME ...] [--again NAME ...]      the README's table
    scripts/bench_drift --all                                                     and docs/drift-table.md
    scripts/bench_drift --lora                     that page's section on a LoRA adapter
    scripts/bench_drift --llama                    its section on GGUF, run in llama.cpp (llama-cpp-python)
    scripts/bench_drift --second                   that on a second decoder, which is made first
    scripts/bench_drift --kept                     that page alone, from the rows that were measured already,
                                                   or with one of these that section alone

All rows are measured on the same windows of the demo's held-out text (with --all on code too), against logits
the reference gave once. Rows are kept in the cache and measured again when what they depend on changes, so a
run that was broken off goes on where it was. Speed is greedy decoding of 64 tokens, the best of three; it
belongs to the machine named under the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

from scripts import bench_drift_lora as lora
from scripts import bench_drift_second as second
from scripts import bench_drift_table as tables
from scripts.bench_drift_encoder import encoder_table
from scripts.bench_drift_peers import peers
from scripts.bench_drift_rows import Bench, Remembered, Row, Way
from scripts.bench_drift_ways import more, short
from scripts.prepare_demo import Demo, cache_folder, prepare
from scripts.second_decoder import prepare_second
from vera_edge.adapters import reading as adapter
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.reference import model as reference
from vera_edge.text import windows
from vera_edge.trained import provenance

CODE_TOKENS = 1024


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tokens", type=int, default=4096, help="about how many tokens to measure on")
    options.add_argument("--all", action="store_true", help="all methods and peers, on code too")
    options.add_argument("--kept", action="store_true", help="write the page from the rows that are there")
    options.add_argument("--only", nargs="*", help="these rows alone, shown and not written")
    options.add_argument("--again", nargs="*", default=[], help="measure these rows again")
    options.add_argument("--lora", action="store_true", help="the ways to ship a LoRA adapter")
    options.add_argument("--llama", action="store_true", help="GGUF files, run in llama.cpp")
    options.add_argument("--second", action="store_true", help="the ways to ship a second decoder's adapter")
    chosen = options.parse_args()
    demo, out = prepare(), cache_folder() / "drift-bench"
    if chosen.lora:
        _section(lora.LoraDemo(demo.folder), out / "lora", chosen, tables.LORA, lora)
        return
    if chosen.second:
        _section(prepare_second(), out / "second", chosen, tables.SECOND, second)
        return
    if chosen.llama:
        from scripts import bench_drift_llama_rows as llama  # llama-cpp-python

        _section(demo, out / "llama", chosen, tables.LLAMA, llama)
        return
    bench = replace(
        _bench(demo, out, chosen.tokens), again=frozenset(chosen.again), with_speed=not chosen.only
    )
    scored = {name: cut.scored for name, cut in bench.texts.items()}
    if chosen.kept:
        tables.write(None, tables.rest(tables.long_table(bench.kept()), encoder_table(demo, out), scored))
        return
    rows = _rows(bench, short(demo, out), chosen.only)
    below = None
    if chosen.all or chosen.only:
        others = _rows(bench, [*more(demo, out, bench), *peers(demo, out)], chosen.only)
        long = tables.long_table([*rows, *others])
        if chosen.only:
            print(long)
            return
        below = tables.rest(long, encoder_table(demo, out), scored)
    readme = tables.short_table([*rows, bench.bare], scored[tables.MEASURED])
    print(readme, below or "", sep="\n")
    tables.write(readme, below)


def _section(demo: Demo, out: Path, chosen: argparse.Namespace, title: str, room: ModuleType) -> None:
    """Measure and write the section of a module that has `ways` and `section`."""
    out.mkdir(parents=True, exist_ok=True)
    bench = replace(_bench(demo, out, chosen.tokens), again=frozenset(chosen.again))
    if chosen.only:
        print(tables.long_table(_rows(bench, list(room.ways(demo, out)), chosen.only)))
        return
    rows = bench.kept() if chosen.kept else [*_rows(bench, list(room.ways(demo, out)), None), bench.bare]
    scored = {name: cut.scored for name, cut in bench.texts.items()}
    tables.write_section(title, room.section(rows, scored))


def _bench(demo: Demo, out: Path, tokens: int) -> Bench:
    checkpoint, trained = Checkpoint.open(demo.base), adapter.read(demo.adapter)
    tokenizer, size = windows.open_tokenizer(demo.base), int(checkpoint.config["vocab_size"])
    texts = {
        tables.MEASURED: windows.make(windows.read_text(demo.eval_text), tokenizer, size, tokens),
        tables.OTHER: windows.make(windows.read_text(demo.code_text), tokenizer, size, CODE_TOKENS),
    }
    facts = f"{checkpoint.digest[:16]} {trained.digest[:16]} {[cut.scored for cut in texts.values()]}"

    @cache
    def model() -> reference.TorchReference:
        projections = provenance.source_of(trained, checkpoint).projections
        return reference.open_reference(checkpoint, [(trained, 1.0)], projections)

    known = out / "logits" / f"{checkpoint.digest[:16]}-{trained.digest[:16]}"
    return Bench(
        reference=Remembered(model, known / "trained", size),
        base=Remembered(lambda: model().adapter_off(), known / "base", size),
        texts=texts,
        folder=out / "rows",
        facts=facts,
    )


def _rows(bench: Bench, ways: Sequence[Way], only: Sequence[str] | None) -> list[Row]:
    found = []
    for way in ways:
        if not only or way.name in only:
            print(f"{way.name}", file=sys.stderr, flush=True)
            found.append(bench.row(way))
    return found


if __name__ == "__main__":
    main()
