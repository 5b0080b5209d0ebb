"""Chat templates render what transformers' apply_chat_template renders, at a bounded cost.

The templates in tests/templates do what those of widely used models do: fold or refuse a system message, list
tools in several dialects, call and answer them, cut out thoughts, read documents, dates and arguments.
"""

from __future__ import annotations

import enum
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.tiny_bundle import TinyBundles, rewrite
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.session import Session
from vera_edge.device.runtime.template import ChatTemplate, read
from vera_edge.errors import BundleError, DataError, VeraEdgeError

FOLDER = Path(__file__).parents[3] / "templates"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

SYSTEM = {"role": "system", "content": "Be brief; /no_think \n"}
HI = {"role": "user", "content": "Hi"}
USER = {"role": "user", "content": "  What's the weather in Zürich? <b>&\"'\n"}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSunny. "}
CALL = {
    "id": "abcDEF123",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "units": ["C", None]}},
}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city. <é>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "enum": [1, 2]},
                "where": {"type": "array", "items": {"type": "number"}},
                "more": {"type": "object", "properties": {"a": {"type": "string"}}},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
CONVERSATIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "one question": [USER],
    "a system message": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "And tomorrow?"}],
    "an answer at the end": [USER, ANSWER],
    "a tool that was called": [USER, CALLS, {"role": "tool", "content": "22", "tool_call_id": "abcDEF123"}],
    "two calls, two results, an answer": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"t": 22}'},
        {"role": "tool", "content": '{"t": 19}'},
        ANSWER,
    ],
    "a result that is an object": [USER, CALLS, {"role": "tool", "content": {"content": 22, "unit": "°C"}}],
    "thoughts in a field of their own": [USER, {**ANSWER, "thinking": "Well."}, USER],
    "content in parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Hi "}]}],
    "what is none": [{"role": "system", "content": "S", "tools": None}, {**USER, "name": None}],
    "tools in a message": [{"role": "system", "content": "S", "tools": "[]"}, USER],
    "roles that don't alternate": [USER, USER],
    "roles that nobody knows": [{"role": "debug", "content": "x"}, USER, {"role": "stop", "content": "y"}],
    "an answer first": [ANSWER, USER],
}
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "no prompt for an answer": {"add_generation_prompt": False},
    "tools": {"tools": [TOOL, TOOL]},
    "no tools": {"tools": []},
    "documents": {"documents": [{"title": "A", "text": "é"}, {"text": "B", "year": 2024}]},
    "no thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True, "xml_tools": [TOOL], "python_tools": ["def f(): ..."]},
    "a date": {"date_string": "1 Jan 2025", "tools_in_user_message": False, "tools": [TOOL]},
    "another end": {"eos_token": "</s>", "custom_tools": [{"a": 1}]},
}


@cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        tiny.save_tokenizer(Path(folder))
        made = PreTrainedTokenizerFast.from_pretrained(folder, pad_token=None, unk_token=None, **SPECIAL)
    assert made.special_tokens_map == SPECIAL
    return made


def theirs(source: str, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str | None:
    """What transformers renders; None when it, or the template, refuses."""
    render = tokenizer().apply_chat_template
    options = {"add_generation_prompt": not arguments.get("continue_final_message")} | dict(arguments)
    try:
        found = render(messages, chat_template=source, tokenize=False, **options)
    except Exception:  # of jinja2 and of transformers, many kinds
        return None
    assert isinstance(found, str)
    return found


def ours(source: str, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str | None:
    try:
        return ChatTemplate({"default": source}, SPECIAL).render(messages, arguments)
    except VeraEdgeError as error:
        assert len(str(error).splitlines()) == 1
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str) -> None:
    rendered = 0
    for messages in CONVERSATIONS.values():
        for arguments in ARGUMENTS.values():
            expected = theirs(TEMPLATES[name], messages, arguments)
            assert ours(TEMPLATES[name], messages, arguments) == expected
            rendered += expected is not None
    assert rendered > 20


def test_every_conversation_is_rendered_by_some_template() -> None:
    for messages in CONVERSATIONS.values():
        assert sum(theirs(source, messages, {}) is not None for source in TEMPLATES.values()) > 2


words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", "</think>", "<think>\nx", "\n", "<tool_response>", "/think", "/no_think", "{{ x }}", "\u2028", '"\\']
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": words, "arguments": values})},
    optional={"id": st.text("abc123", min_size=9, max_size=9), "type": st.just("function")},
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", "debug"]),
        "content": words | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words})) | values,
    },
    optional={
        "tool_calls": st.none() | st.lists(calls, max_size=2),
        "reasoning_content": st.none() | words,
        "name": values,
    },
)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    messages=st.lists(messages, min_size=1, max_size=5),
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "tools": st.none()
            | st.lists(st.just(TOOL) | st.dictionaries(words, values, max_size=2), max_size=2),
            "documents": st.none() | st.lists(st.dictionaries(words, values, max_size=2), max_size=2),
            "add_generation_prompt": st.booleans(),
            "enable_thinking": values,
            "xml_tools": values,
        },
    ),
)
def test_any_messages_render_as_in_transformers(
    name: str, messages: list[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> None:
    assert ours(TEMPLATES[name], messages, arguments) == theirs(TEMPLATES[name], messages, arguments)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"odds_and_ends", "calls"}))  # show it twice
@pytest.mark.parametrize("content", ["Sunny, and", "Sunny, and \n", "  ", [{"type": "text", "text": "Sun"}]])
def test_the_last_message_goes_on(name: str, content: Any) -> None:
    chat = [USER, {"role": "assistant", "content": content, "reasoning_content": "Hm"}]
    for field in (True, "content", "reasoning_content", "thinking", "nothing"):
        arguments = {"continue_final_message": field}
        assert ours(TEMPLATES[name], chat, arguments) == theirs(TEMPLATES[name], chat, arguments)


@pytest.mark.parametrize(
    "source",
    [
        "{% if tools is not none %}T{% endif %}{% if documents is none %}D{% endif %}",
        "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ nothing }}",
        "{% generation %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{% endgeneration %}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{% break %}{% endgeneration %}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{{ namespace(_a=1)._a }}",
        "{% set ns = namespace() %}{% set ns['_a'] = 1 %}",
        "{{ dict.__class__ }}{{ dict.fromkeys('ab') }}",
        "{{ messages[0].thinking }}{{ messages[0].reasoning }}{{ messages[0] | length }}",
        "{{ lipsum is defined }}"[:0]
        + "{{ cycler is defined }}{{ joiner is defined }}{{ range is defined }}",
        "{{ messages[0]['content'].nothing is defined }}{{ messages[0].content.upper() }}",
        "{% for m in 5 %}{% endfor %}",
        "{% for m in nothing %}x{% endfor %}{{ nothing.more }}",
        "{% for x in ''.join(messages | map(attribute='content')) %}{{ x }}{% endfor %}{{ loop }}",
        "{% for m in messages %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{{ m.role }}{% endfor %}",
        "{{ 'a' ~ 'b' ~ 1 ~ nothing ~ none }}{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['a', 'b']) }}",
        "{{ '%s: %5.1f%%' % ('x', 2) }}{{ '{} {!r:>8}'.format('a', 'b') }}",
        "{{ 'In {}: {}'.format(1234567, 2) }}{{ 'In 1000000 years: %s, {x}' % 1000000 }}",
        "{{ 10 ** 3 }}{{ 'ab' * 3 }}{{ 3 * [1] }}{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 1.5 * 2 }}",
        "{{ 2 ** 0.5 }}{{ 2 ** -1 }}{{ '' * -1 }}{{ 'a' * true }}{{ 7 % 4 }}{{ -7 % 4.5 }}{{ 'a' + 'b' }}",
        "{{ messages | string }}{{ messages | pprint }}{{ messages | list | tojson(indent=1) }}",
        "  {% if true %}  \n  a  \n  {%- endif +%}  \n b {#- c -#} \n",
        "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}"
        "{{ m(1) }}{{ m(1, 3, 4, c=5) }}{{ m() }}",
    ],
)
def test_the_language_is_transformers(source: str) -> None:
    for chat in ([USER], [{**USER, "reasoning": "r"}, ANSWER]):
        assert ours(source, chat, {}) == theirs(source, chat, {})


def test_objects_become_plain_data() -> None:
    """Objects would offer their methods to a stranger's template."""

    class Role(enum.StrEnum):
        USER = "user"

    class Written:
        def save(self) -> str:
            raise AssertionError("the template called a method")

    @dataclass
    class Part:
        type: str
        text: str

    chat: list[Any] = [
        {"role": Role.USER, "content": "a", "size": np.float32(2), "on": np.bool_(False), "odd": Written()},
        {"role": "assistant", "content": [Part("text", "b")], "ids": (1, 2)},
    ]
    source = "{{ messages }}{{ messages[0].role.name is defined }}{{ messages[0].odd.save() if false }}"
    assert ours(source, chat, {}) == theirs(source, chat, {})
    assert "<Written>" in str(ours(source, chat, {}))
    assert ours("{{ messages[0].odd.save() }}", chat, {}) is None


def test_what_a_template_reads() -> None:
    """A variable that it sets when it isn't defined is one that it reads."""
    template = ChatTemplate({"default": TEMPLATES["marked_answers"]}, SPECIAL)
    read = {"enable_thinking": 0, "xml_tools": 0, "add_generation_prompt": 0, "continue_final_message": 0}
    assert template.unread(read) is None
    assert template.unread(read | {"documents": []}) == "documents"
    assert template.unread({"namespace": 0}) == template.unread({"namespace": 0, "tools": []}) == "namespace"


def test_what_is_no_message_is_refused() -> None:
    template = ChatTemplate({"default": "{{ messages }}"}, SPECIAL)
    with pytest.raises(DataError, match="a message is 'hi'; give objects with a role and content"):
        template.render(["hi"])  # type: ignore[list-item]
    for name in ("tools", "documents"):
        for wrong in ("text", {"a": 1}, [str]):
            with pytest.raises(DataError, match=f"{name} must be a list of objects"):
                template.render([USER], {name: wrong})
    with pytest.raises(DataError, match="aren't a template argument"):
        template.render([USER], {"messages": []})
    with pytest.raises(DataError, match="give one of the two"):
        template.render([USER], {"continue_final_message": True, "add_generation_prompt": True})
    deep: dict[str, Any] = {}
    deep["in"] = deep
    with pytest.raises(DataError, match="nested too deeply"):
        template.render([{"role": "user", "content": deep}])


def test_a_long_conversation_is_within_the_bounds() -> None:
    chat = [{"role": "user", "content": "word " * 500}, ANSWER] * 400
    for source in TEMPLATES.values():
        assert ours(source, chat, {}) == theirs(source, chat, {})
    assert ours(TEMPLATES["thinking"], chat, {}) is not None


def named(folder: Path, templates: Mapping[str, str], way: str) -> Path:
    """A tokenizer's folder with templates of these names, as older or newer models have them."""
    tiny.save_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    entries = [{"name": name, "template": source} for name, source in templates.items()]
    if way == "list":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": entries}))
        return folder
    (folder / "additional_chat_templates").mkdir()
    for name, source in templates.items():
        file = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        (folder / f"{file}.jinja").write_text(source)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "from the config"}))
    return folder


@pytest.mark.parametrize("way", ["list", "files"])
@pytest.mark.parametrize("names", [["default", "tool_use", "rag"], ["default", "rag"], ["tool_use"], ["rag"]])
def test_a_template_is_chosen_by_name_as_in_transformers(tmp_path: Path, way: str, names: list[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    sources = {name: f"{name}: {{{{ tools is none }}}}{{{{ eos_token }}}}" for name in names}
    folder = named(tmp_path, sources, way)
    text, reference = BundleText(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    tools: list[dict[str, Any]] = [{}, {"tools": None}, {"tools": []}, {"tools": [TOOL]}]
    for arguments in (*tools, {"documents": [{"text": "t"}]}):
        try:
            expected = reference.apply_chat_template([USER], tokenize=False, **arguments)
        except ValueError:
            with pytest.raises(BundleError, match="and none is the default"):
                text.render([USER], arguments)
            continue
        assert text.render([USER], arguments) == expected


def test_older_folders_have_special_tokens_in_a_map(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tiny.save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<other>"}')
    special = {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False)
    assert BundleText(tmp_path).render([USER]) == expected == "<|im_start|><|im_end|>"


@pytest.fixture(scope="module")
def thinking(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose template has arguments."""
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path_factory.mktemp("thinking") / "bundle")
    (folder / "chat_template.jinja").write_text(
        TEMPLATES["thinking"] + "{{ tools | tojson if tools }}{{ documents | tojson if documents }}{{ n }}"
    )
    rewrite(folder)
    return folder


def test_arguments_reach_the_template(thinking: Path) -> None:
    session = Session.open(thinking)
    source = (thinking / "chat_template.jinja").read_text()

    def expected(**arguments: Any) -> list[int]:
        text = theirs(source, [HI], arguments)
        assert text is not None
        return session.text.tokens(text, special=False).tolist()

    def fed(**options: Any) -> list[int]:
        generation = session.generate([HI], max_tokens=0, **options)
        return generation.prompt.tolist()

    assert fed() == expected()
    assert fed(template_args={"enable_thinking": False}) == expected(enable_thinking=False) != expected()
    beside: dict[str, Any] = {"tools": [{"name": "f"}], "documents": [{"text": "d"}]}
    assert fed(**beside) == expected(**beside) != expected()
    chat = [HI, {"role": "assistant", "content": "It is"}]
    going_on = session.generate(chat, max_tokens=0, template_args={"continue_final_message": True})
    assert session.text.text(going_on.prompt, special=True).endswith("\nIt is")
    batch = session.generate_batch([[HI]], max_tokens=1, template_args={"enable_thinking": False})
    alone = session.generate([HI], max_tokens=1, template_args={"enable_thinking": False})
    list(batch), list(alone)
    assert batch.tokens[0] == alone.tokens


def test_arguments_without_an_effect_are_refused(thinking: Path) -> None:
    session = Session.open(thinking)
    with pytest.raises(DataError, match=r"doesn't read 'enable_thinkin'; it reads: .*enable_thinking, n, "):
        session.generate("Hi", template_args={"enable_thinkin": False})
    with pytest.raises(
        DataError, match="enable_thinking is for a chat template, and this prompt goes without"
    ):
        session.generate("Hi", raw=True, template_args={"enable_thinking": False})
    with pytest.raises(DataError, match="tools is for a chat template, and the prompt is token ids"):
        session.generate(np.array([5, 6]), tools=[TOOL])


def test_templates_of_a_config_that_are_none_are_left_out(tmp_path: Path) -> None:
    """Names of any type, and a second template that can't be compiled."""
    given = [{"name": ["a"], "template": "x"}, {"name": "default", "template": "{{ a }}"}, {"name": {}}, 1]
    sources = read(tmp_path, {"chat_template": given})
    assert sources == {"default": "{{ a }}"}
    broken = ChatTemplate({**sources, "tool_use": "{% if"}, {})
    assert broken.variables() == ["a"]


def test_lists_are_summed_and_compared_as_jinja_does() -> None:
    source = "{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2] | sum }}{{ [{'a': 3}] | sum(attribute='a') }}"
    source += "{{ [1, 2] == [1, 2] }}{{ 1 in [1] }}{{ 2 < 3 < 4 }}{{ {'a': 1}['a'] }}{{ 'a' is in(['a']) }}"
    assert ChatTemplate({"default": source}, {}).render([USER]) == "[1, 2]33TrueTrueTrue1True"
