"""A conversation: what is said is rendered, kept as far as it came, forgotten when it no longer fits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny_bundle import TinyBundles, rewrite
from vera_edge.device.runtime.conversation import Conversation
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, DataError, MismatchError


@pytest.fixture
def session(tiny_bundles: TinyBundles) -> Session:
    return Session.open(tiny_bundles.branch, threads=1)


def test_each_answer_is_that_of_all_messages_so_far(session: Session) -> None:
    talk = Conversation(session, "Be brief.", max_tokens=8)
    for text in ("Merge the two.", "And then?", "Why?"):
        said = [*talk.messages, {"role": "user", "content": text}]
        expected = "".join(session.generate(said, max_tokens=8))
        assert "".join(talk.say(text)) == expected
        assert talk.messages == [*said, {"role": "assistant", "content": expected}]
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 3]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(session: Session) -> None:
    talk = Conversation(session, max_tokens=20)
    answer = talk.say("Merge the two.")
    first = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert [message["content"] for message in talk.messages] == ["Merge the two.", first]
    never = talk.say("And then?")
    never.close()  # type: ignore[attr-defined]
    assert len(talk.messages) == 2


def test_what_fails_leaves_nothing_behind(session: Session) -> None:
    talk = Conversation(session, max_tokens=4)
    with pytest.raises(DataError, match="that makes 917 tokens, and the model reads 256"):
        "".join(talk.say("long " * 300))
    assert talk.messages == []
    assert "".join(talk.say("  \n")) == "" and talk.messages == []


def test_where_the_context_ends_the_first_is_forgotten(session: Session) -> None:
    talk = Conversation(session, "Be brief.", max_tokens=16)
    while not talk.forgotten:
        before = talk.messages
        assert "".join(talk.say("A small delta may fall between the grid points of a layer.")) or True
        assert len(before) < 40
    assert talk.messages[0]["role"] == "system" and talk.messages[1]["role"] == "user"
    assert len(talk.messages) <= len(before) + 2 - talk.forgotten


def test_commands_change_what_comes(session: Session) -> None:
    talk = Conversation(session, max_tokens=6)

    def take(line: str) -> str:
        return "".join(talk.take(line))

    assert take("/adapter") == "* first\n  second\n  none"
    assert take("/adapter second") == "adapter: second" and session.adapter == "second"
    answers = {take("Merge."), (take("/reset"), take("/adapter none"), take("Merge."))[-1]}
    assert len(answers) == 2 and session.adapter is None
    file = session.manifest.folder / "adapters" / "first.onnx_adapter"
    assert take(f"/adapter {file}").endswith("first.onnx_adapter")
    take("/system Be brief.")
    assert talk.messages[0] == {"role": "system", "content": "Be brief."}
    take("/system")
    assert talk.messages[0]["role"] == "user"
    assert take("/reset") and talk.messages == []
    assert "/adapter NAME" in take("/help")
    take("//adapter")
    assert talk.messages[0]["content"] == "/adapter"
    assert not talk.ended and take("/quit") == "" and talk.ended


def test_what_a_command_cannot_do_is_told_and_changes_nothing(session: Session) -> None:
    talk = Conversation(session)
    with pytest.raises(MismatchError, match="has no adapter named 'third'"):
        "".join(talk.take("/adapter third"))
    with pytest.raises(DataError, match="there is no command /adaptor"):
        "".join(talk.take("/adaptor first"))
    assert session.adapter == "first" and talk.messages == []


def test_a_bundle_without_a_template_or_with_a_merged_adapter(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    merged = Conversation(Session.open(tiny_bundles.fp32))
    assert "".join(merged.take("/adapter")) == "the adapter is merged into this bundle"
    with pytest.raises(MismatchError, match="can't be changed"):
        "".join(merged.take("/adapter none"))
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    rewrite(folder)
    with pytest.raises(BundleError, match="no chat template"):
        Conversation(Session.open(folder))
