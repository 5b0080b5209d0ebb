"""bench_scale: a process measured, operations counted, results kept, the page written, the cheap rows run."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import (
    bench_llama_cpp,
    bench_models,
    bench_scale,
    bench_scale_goals,
    bench_scale_page,
)
from scripts.bench_models import SIZES
from scripts.bench_process import Limits, descendants, run
from scripts.bench_scale_results import Machine, Result, Results
from scripts.bench_scale_rows import rows

MACHINE = Machine("a processor", 2, 100.0, 1e9)
RESULT = Result(
    size="1.2b",
    layers=16,
    all_layers=16,
    base="nf4",
    row="int8",
    end="done",
    note="",
    rank=256,
    limit=None,
    wall=150.0,
    cpu=200.0,
    peak=2_000_000_000,
    anonymous=1_000_000_000,
    disk=3_000_000_000,
    output=2_900_000_000,
    base_bytes=900_000_000,
    float32=5_000_000_000,
    load=0.5,
    flops=None,
    machine=MACHINE,
    versions={"numpy": "2.0"},
)


def python(code: str) -> list[str | Path]:
    return [sys.executable, "-c", code]


def test_memory_of_a_process_and_its_child_is_counted(tmp_path: Path) -> None:
    child = "import time; x = bytearray(b'1') * (200 << 20); time.sleep(1)"
    code = (
        "import subprocess, sys; x = bytearray(b'1') * (100 << 20);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    cost = run(python(code), tmp_path)
    assert cost.end == "done"
    assert 300 << 20 < cost.peak < 400 << 20
    assert 300 << 20 < cost.anonymous <= cost.peak


def test_disk_is_the_most_that_lay_there_not_what_is_left(tmp_path: Path) -> None:
    code = (
        "import os, tempfile, time; f = tempfile.NamedTemporaryFile(); f.write(os.urandom(8 << 20));"
        "f.flush(); time.sleep(1.5)"
    )
    (tmp_path / "before").write_bytes(os.urandom(1 << 20))
    cost = run(python(code), tmp_path)
    assert 8 << 20 <= cost.disk < 9 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("limits", "end"),
    [(Limits(seconds=0.5), "over the time"), (Limits(memory=100 << 20), "over the memory")],
)
def test_a_command_over_its_limit_is_ended_with_its_children(
    tmp_path: Path, limits: Limits, end: str
) -> None:
    child = "import time; x = bytearray(b'1') * (200 << 20); time.sleep(60)"
    code = (
        "import pathlib, subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(p.pid)); p.wait()"
    )
    cost = run(python(code), tmp_path, limits)
    assert cost.end == end
    assert cost.wall < 30
    state = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    for _ in range(100):  # until the system has cleared it away
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child still runs")


def test_a_failure_says_its_last_line_and_some_codes_are_no_failure(tmp_path: Path) -> None:
    failing = python("import sys; print('out'); sys.stderr.write('first\\nlast\\n\\n'); sys.exit(3)")
    cost = run(failing, tmp_path)
    assert (cost.end, cost.said, cost.output) == ("failed", "last", "out\n")
    assert run(failing, tmp_path, exits=(0, 3)).end == "done"


def test_descendants_begin_with_the_process_itself() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        assert next(iter(descendants(os.getpid()))) == os.getpid()
        assert child.pid in descendants(os.getpid())
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("size", [size for name, size in SIZES.items() if name != "tiny"])
def test_sizes_are_those_of_their_names(size: bench_models.Size) -> None:
    name = next(name for name, one in SIZES.items() if one is size)
    billions = size.float32_bytes / 4e9
    assert billions == pytest.approx(float(name.removesuffix("b")), rel=0.1)


def test_fewer_layers_are_known_as_fewer() -> None:
    size = SIZES["8b"].of_layers(16)
    assert (size.layers, size.all_layers) == (16, 32)
    assert size.linear_weights * 2 == SIZES["8b"].linear_weights
    assert SIZES["8b"].of_layers(40) == SIZES["8b"]


def test_results_are_kept_by_row_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.json"
    results = Results(file)
    for result in (RESULT, replace(RESULT, row="merge"), replace(RESULT, wall=99.0)):
        results.put(result)
    again = Results(file)
    assert [(one.row, one.wall) for one in again] == [("int8", 99.0), ("merge", 150.0)]
    assert again.get(RESULT.key) == replace(RESULT, wall=99.0)


def test_goals_say_what_was_reached_missed_and_not_measured() -> None:
    slow = replace(RESULT, row="int4-default", wall=76 * 60.0, flops=100e12)
    part = replace(RESULT, size="8b", layers=16, all_layers=32, end="over the time")
    lines = bench_scale_goals.lines([RESULT, slow, part])
    assert "| int8 export, memory | 1.2b, nf4 | 2.5 GB | 2.00 GB | reached |" in lines
    assert "| int4 export, default, time | 1.2b, nf4 | 75 min | 76.00 min | **not reached** |" in lines
    # 100 TFLOP at 100 GFLOP/s take 1000 s.
    assert (
        "| int4 export, default, over its products | 1.2b, nf4 | 1.5 times | 4.56 times | **not reached** |"
        in lines
    )
    assert "| int8 export, memory | 8b, nf4 | 6 GB |  | over the time |" in lines
    assert "| drift of the int8 export, memory | 8b, nf4 | 6 GB |  | not measured |" in lines


def test_a_merge_is_held_against_the_slower_of_copy_and_products() -> None:
    merge = replace(RESULT, row="merge", wall=3.0, flops=50e9)
    assert bench_scale_goals.merge_limit(merge) == pytest.approx(3.0 / 0.9)  # copying 0.9 GB at 1 GB/s
    assert bench_scale_goals.merge_limit(replace(merge, flops=200e9)) == pytest.approx(3.0 / 2.0)


def test_the_page_holds_rows_beside_their_peers_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "scale.md"
    page.write_text(bench_scale_page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(bench_scale_page, "PAGE", page)
    results = [
        replace(RESULT, size="tiny"),
        replace(RESULT, row="merge", base="bf16", flops=1e9),
        replace(RESULT, row="peft", base="bf16", wall=300.0),
        replace(RESULT, size="0.13b", float32=540_000_000),
        RESULT,
        replace(RESULT, size="8b", layers=16, all_layers=32, end="over the time", limit=90.0),
    ]
    for _ in range(2):  # again into the page that it made
        bench_scale_page.write(results)
    text = page.read_text(encoding="utf-8")
    assert (
        "| 1.2b, nf4 | vera-edge | 150 s | 200 s | 2.00 GB | 0.40 | 3.00 GB | 0.60 | 2.90 GB |  | 0.5 |"
        in text
    )
    assert (
        text.index("### Merge") < text.index("| 1.2b, bf16 | PEFT's merge | 300 s") < text.index("### Export")
    )
    assert "| 8b, nf4, 16 of 32 layers | vera-edge | over 90 min |" in text
    assert "tiny," not in text
    assert text.count("](scale-memory.svg)") == 1
    for name in ("scale-memory.svg", "scale-time.svg"):
        assert (tmp_path / name).read_bytes().startswith(b"<svg xmlns")


def test_the_cheap_rows_run_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has loaded what makes the model; the rows have processes of their own."""
    file = tmp_path / "results.json"
    words = ["--size", "tiny", "--source", "nf4", "--json", "--row", "decode", "--rank", "16"]
    monkeypatch.setattr(sys, "argv", ["bench_scale", *words, "--results", str(file)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # what handles SIGTERM here stays
    with pytest.raises(SystemExit) as ended:
        bench_scale.main()
    assert ended.value.code == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # What decodes needs the export, which is a row of its own.
    assert [(one["row"], one["end"]) for one in told] == [("int8", "done"), ("decode", "done")]
    assert told[1]["note"] == "8 tokens decoded"
    assert all(one["wall"] > 0 and one["cpu"] > 0 and one["peak"] > 10 << 20 for one in told)
    weights = SIZES["tiny"].linear_weights
    assert weights * 9 / 8 < told[0]["output"] <= told[0]["disk"]
    assert {result.row for result in Results(file)} == {"int8", "decode"}
    monkeypatch.setattr(bench_models, "make", None)
    with pytest.raises(SystemExit) as ended:
        bench_scale.main()
    assert (ended.value.code, capsys.readouterr().out) == (0, "")  # nothing is made or measured twice


def test_the_converter_is_what_the_source_brings_and_nothing_else(tmp_path: Path) -> None:
    inside = ("convert_hf_to_gguf.py", "conversion/llama.py", "gguf-py/gguf/__init__.py", "src/llama.cpp")
    with tarfile.open(tmp_path / "source.tar.gz", "w:gz") as archive:
        for name in (*(f"package/vendor/llama.cpp/{one}" for one in inside), "package/setup.py"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    bench_llama_cpp._unpack_converter(tmp_path / "source.tar.gz", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.py")}
    assert found == set(inside[:3])
    assert (tmp_path / "out" / inside[1]).read_text() == f"package/vendor/llama.cpp/{inside[1]}"
    assert not (tmp_path / "out" / "src").exists() and not list((tmp_path / "out").rglob("setup.py"))


def test_every_row_names_rows_that_are_there() -> None:
    known = rows()
    assert all(row.needs is None or row.needs in known for row in known.values())
    assert all(row.beside is None or row.beside in known for row in known.values())
