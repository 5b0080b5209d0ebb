"""What a merge costs in time, processor, memory and bytes, beside PEFT's and beside what the machine allows.

    scripts/bench_merge [--size tiny|0.13b|0.5b|1.2b|1.5b|3b|7b|8b] [--layers N] [--source nf4]
        [--source bf16] [--rank 256] [--lora] [--workers N] [--without-peft] [--folder DIR] [--make] [--json]

The base is a Llama of that size with random weights, in shards, made by code; the adapter a VeRA adapter on
all of its linears, or with --lora a LoRA. Each row runs in a process of its own, to the base's own format,
rounded to nearest, and begins with nothing of the base in the system's memory. PEFT loads the model, merges
in its weights and saves it where it can. The limits: the base's files copied and flushed, and the products
B A alone, on one thread and on all.

`wall` is from a process's start to its end, `seconds` without the interpreter's start. `user` and `system`
are seconds of processor time, `ns` that time in ns per weight of the linears: on a machine that does other
work too, hold it against that of the products, and not `wall` against theirs. `read` and `written` are what
was asked of the system. --layers: only so many of the model's layers, where the whole has no room. With
--folder the models stay there and are used again; --make only makes them. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench_models import SIZES, Size, make
from scripts.bench_process import forget
from vera_edge.cores import available_cores
from vera_edge.requantize.gram import one_blas_thread

# What the measured processes run; each prints its own account when it is done.
ACCOUNT = """
import json, os, resource, sys, time
begun = time.perf_counter()
facts = {}
"""
REPORT = """
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
io = dict(line.split(': ') for line in open('/proc/self/io').read().splitlines())
facts |= {
    'seconds': time.perf_counter() - begun,
    'user': sum(u.ru_utime for u in usage), 'system': sum(u.ru_stime for u in usage),
    'peak': int(status['VmHWM'].split()[0]) * 1024,
    'read': int(io['rchar']), 'written': int(io['wchar']),
}
print(json.dumps(facts))
"""
OURS = """
from pathlib import Path
from vera_edge import merging as merge
from vera_edge.parallel import Engine
if __name__ == '__main__':
    base, adapter, out = map(Path, sys.argv[1:4])
    where = merge.Resources(Engine(workers=int(sys.argv[4])))
    merge.to_folder(base, [(adapter, 1.0)], out, resources=where)
"""
PEFT = """
import warnings; warnings.filterwarnings('ignore')
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map='cpu')
facts['loaded'] = time.perf_counter() - begun
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
facts['merged'] = time.perf_counter() - begun
try:
    model.save_pretrained(out)
except NotImplementedError as error:
    facts['save'] = 'NotImplementedError'
"""


def run(code: str, *words: object) -> dict[str, Any]:
    """The account of a process of its own, by wall clock from its start."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "measured.py"
        guard = "if __name__ == '__main__':\n" + "".join(f"    {row}\n" for row in REPORT.splitlines())
        script.write_text(ACCOUNT + code + guard)
        forget(Path(str(words[0])))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, script, *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told | {"wall": time.perf_counter() - begun}


def copy_limit(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files and flush them."""
    forget(source)
    target.mkdir()
    begun = time.perf_counter()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb+") as stream:
            os.fsync(stream.fileno())
    took = time.perf_counter() - begun
    shutil.rmtree(target)
    return took


def product_limit(size: Size, rank: int) -> dict[str, float]:
    """Wall and processor seconds for the products B A of all linears."""
    rng = np.random.default_rng(2)
    pairs = {
        shape: (
            rng.standard_normal((shape[0], rank), np.float32),
            rng.standard_normal((rank, shape[1]), np.float32),
        )
        for shape in set(size.linears().values())
    }
    outs = {shape: np.empty(shape, np.float32) for shape in pairs}
    for shape in pairs:  # so that no page of theirs is new to the process
        np.matmul(*pairs[shape], out=outs[shape])
    begun, used = time.perf_counter(), time.process_time()
    for shape in size.linears().values():
        np.matmul(*pairs[shape], out=outs[shape])
    return {"wall": time.perf_counter() - begun, "user": time.process_time() - used, "system": 0.0}


def bench(words: argparse.Namespace, size: Size, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows, one measured thing each."""
    adapter, sources = folder / ("lora" if words.lora else "adapter"), words.source or ["nf4", "bf16"]
    make(size, words.rank, folder, sources, lora=words.lora)
    if words.make:
        return
    yield {"what": "products, all threads"} | product_limit(size, words.rank)
    with one_blas_thread():
        yield {"what": "products, one thread"} | product_limit(size, words.rank)
    for source in sources:
        base, out = folder / source, folder / "out"
        yield {"what": f"copy, {source}", "wall": copy_limit(base, folder / "copy")}
        for workers in words.workers or [available_cores()]:
            yield {"what": f"vera-edge, {source}, workers {workers}"} | run(OURS, base, adapter, out, workers)
            shutil.rmtree(out)
        if not words.without_peft:
            yield {"what": f"PEFT, {source}"} | run(PEFT, base, adapter, out)
            shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--source", action="append", choices=["nf4", "bf16"])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--lora", action="store_true", help="a LoRA adapter in the place of VeRA's")
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models are made, and stay")
    parser.add_argument("--make", action="store_true", help="only make the models")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    size = SIZES[words.size]
    size = replace(size, layers=words.layers or size.layers)
    weights = sum(math.prod(shape) for shape in size.linears().values())
    with ExitStack() as held:
        folder = words.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-merge-")))
        folder.mkdir(parents=True, exist_ok=True)
        for row in bench(words, size, folder):
            load = os.getloadavg()[0]
            if "user" in row:
                row["ns"] = (row["user"] + row["system"]) / weights * 1e9
            if words.json:
                print(json.dumps({**row, "load": load}), flush=True)
            else:
                facts = ", ".join(f"{key} {value}" for key, value in row.items() if key != "what")
                print(f"{row['what']}: {facts} (load {load:.1f})", flush=True)


if __name__ == "__main__":
    main()
