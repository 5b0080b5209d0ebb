"""bench_training: the table that is written into docs/training.md."""

from __future__ import annotations

from pathlib import Path

from scripts import bench_training as bench
from scripts.bench_turns import write_section
from scripts.demo_training import Recipe

LIKE = bench.Text(1000, 4, kl=0.004, effect=0.4, low=0.008, high=0.012, trained=14, shipped=14.1, bare=22)
CODE = bench.Text(500, 2, kl=0.006, effect=0.3, low=0.01, high=0.03, trained=20, shipped=20.2, bare=25)


def test_a_row_says_what_is_lost_of_the_effect() -> None:
    head, rule, row, bare = bench.table([bench.Row("integers", LIKE, CODE)])
    assert head.count("|") == rule.count("|") == row.count("|") == bare.count("|")
    assert "| 0.400 | 1.0% (0.8 to 1.2) | 14.000 | 14.100 |" in row
    assert "| 0.300 | 2.0% | 20.000 | 20.200 |" in row
    assert "22.000" in bare and "25.000" in bare
    said = bench.conditions(Recipe(steps=7), bench.Row("integers", LIKE, CODE))
    assert "7 steps of 256 tokens" in said and "on 1000 tokens of held-out topics in 4 windows" in said


def test_the_page_has_a_place_for_it(tmp_path: Path) -> None:
    page = tmp_path / "training.md"
    before = bench.PAGE.read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    write_section("training", ["the table"], page)
    after = page.read_text(encoding="utf-8")
    start, end = "<!-- training: written by scripts/bench_training -->", "<!-- end of training -->"
    assert f"{start}\nthe table\n{end}" in after
    assert [one.split(start)[0] for one in (before, after)] == [before.split(start)[0]] * 2
    assert before.split(end)[1] == after.split(end)[1]
