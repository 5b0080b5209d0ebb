"""The demo's text: split by topic, and nothing of the held-out topics left in the training text."""

from __future__ import annotations

from pathlib import Path

from scripts import demo_text


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n") if part.strip()}


def test_no_held_out_paragraph_is_trained_on() -> None:
    parts = demo_text.split()
    trained = set().union(*(paragraphs(topic.text) for topic in parts.train))
    for topic in parts.evaluation:
        assert not paragraphs(topic.text) & trained
    for topic in parts.calibration:
        assert not paragraphs(topic.text) & trained
        assert not paragraphs(topic.text) & set().union(*(paragraphs(t.text) for t in parts.evaluation))


def test_every_held_out_topic_is_there_and_the_training_text_is_larger_than_both() -> None:
    parts = demo_text.split()
    assert [topic.key for topic in parts.evaluation] == list(demo_text.EVALUATION)
    assert [topic.key for topic in parts.calibration] == list(demo_text.CALIBRATION)
    sizes = [sum(len(t.text) for t in group) for group in (parts.train, parts.evaluation, parts.calibration)]
    assert sizes[0] > 5 * sizes[1] > 0
    assert sizes[2] > 10_000


def test_write_is_repeatable_and_says_the_licence(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        demo_text.write(tmp_path / name, "3.11.7")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"train.txt", "calibration.txt", "eval.txt", "code.txt", "README.md"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "PSF License" in (tmp_path / "one" / "README.md").read_text()
