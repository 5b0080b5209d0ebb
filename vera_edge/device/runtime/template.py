"""Chat templates: messages to text, as transformers' `apply_chat_template` renders them, byte for byte.

A template comes with the bundle and is code in a small language: it runs in jinja2's sandbox, with the names,
filters and tags that transformers gives it (`template_language`), on plain data, at a bounded cost
(`metering`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import numpy as np

from vera_edge.device.runtime.metering import metered
from vera_edge.device.runtime.template_language import RefusedError, environment
from vera_edge.errors import BundleError, DataError

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
FILE = "chat_template.jinja"
_MORE = "additional_chat_templates"
DEFAULT = "default"  # the name of a model's one template, or of the one that is taken by itself
_TOOLS = "tool_use"
# Names under which the thoughts of a message are passed; templates read the first, or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "VERA_EDGE_GOES_ON_HERE "  # put where a message that goes on ends, and cut off there


def read(folder: Path, config: Mapping[str, Any]) -> Mapping[str, str]:
    """The templates of a model's folder by name, "default" where it has one; `config`: tokenizer_config.json.

    chat_template.jinja and additional_chat_templates/NAME.jinja; else those that older models have in the
    config, one or a list with names. Raises BundleError when one isn't text.
    """
    files = [(DEFAULT, folder / FILE)] if (folder / FILE).is_file() else []
    files += [(path.stem, path) for path in sorted((folder / _MORE).glob("*.jinja"))]
    if files:
        return {name: _read(path) for name, path in files}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {DEFAULT: given}
    entries = [entry for entry in given if isinstance(entry, Mapping)] if isinstance(given, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries}
    return {
        name: source for name, source in named.items() if isinstance(name, str) and isinstance(source, str)
    }


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        raise BundleError(f"{path} can't be read as UTF-8 text; copy the bundle again") from None


class ChatTemplate:
    """A model's chat templates. Safe from several threads at once."""

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str]) -> None:
        """sources: by name, as `read` gives them. special: the texts of the special tokens, by name."""
        self.sources, self._special = sources, special
        self._compiled: dict[str, tuple[jinja2.Template, frozenset[str]]] = {}

    def render(self, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None) -> str:
        """The prompt for `messages`, up to where the assistant's answer begins.

        arguments: variables of the template, such as enable_thinking; `tools` and `documents` (lists of
        objects) as transformers takes them, `add_generation_prompt`, and `continue_final_message`: true, or
        the field to go on in, leaves the last message open.
        Raises BundleError when the template fails, DataError when it refuses these messages or arguments.
        """
        given = dict(arguments or {})
        source = self._choose(given.get("tools"))
        chat, given = _checked(messages, given)
        field = given.pop("continue_final_message", False)
        if field:
            field = field if isinstance(field, str) else "content"
            given["add_generation_prompt"] = False
            end = _open_last(chat, field, self.sources[source])
        try:
            template, _ = self._template(source)
            with metered():
                text = template.render(messages=chat, **{**self._special, **given})
        except RefusedError as cause:
            raise DataError(f"the chat template refuses these messages: {_first_line(cause)}") from None
        except Exception as cause:  # whatever a stranger's code raises
            raise BundleError(
                f"the chat template fails ({_first_line(cause)}); export the bundle again"
            ) from None
        return _cut(text, end) if field else text

    def unread(self, arguments: Mapping[str, Any]) -> str | None:
        """The first of `arguments` that the template doesn't read; None when it reads all."""
        source = self._choose(arguments.get("tools"))
        try:
            _, variables = self._template(source)
        except Exception:  # `render` tells what is wrong with it
            return None
        known = variables | {"add_generation_prompt", "continue_final_message"}
        return next((name for name in arguments if name not in known), None)

    def variables(self) -> list[str]:
        """What a person can set: the variables of the templates that no messages or tokenizer give."""
        names = set[str]()
        for source in self.sources:
            with suppress(Exception):  # `render` tells what is wrong with it
                names |= self._template(source)[1]
        return sorted(names - {"messages", "add_generation_prompt"} - set(self._special))

    def _choose(self, tools: Any) -> str:
        name = _TOOLS if tools is not None and _TOOLS in self.sources else DEFAULT
        if name in self.sources:
            return name
        raise BundleError(
            f"this model's chat templates are {', '.join(sorted(self.sources))}, and none is the {DEFAULT}; "
            "export the bundle again from a base that has one"
        )

    def _template(self, name: str) -> tuple[jinja2.Template, frozenset[str]]:
        """The compiled template of this name, and the variables it reads."""
        if name not in self._compiled:
            language = environment()
            tree = language.parse(self.sources[name])
            variables = jinja2.meta.find_undeclared_variables(tree) - language.globals.keys()
            self._compiled[name] = language.compiled(tree), frozenset(variables)
        return self._compiled[name]


def _checked(
    messages: Sequence[Message], given: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and arguments as plain data; raises DataError on what transformers doesn't take either."""
    if "messages" in given:
        raise DataError("messages aren't a template argument; give them as the prompt")
    for name in ("tools", "documents"):
        entries = given.setdefault(name, None)
        if entries is not None and not (
            isinstance(entries, Sequence) and all(isinstance(entry, Mapping) for entry in entries)
        ):
            raise DataError(f"{name} must be a list of objects (tools as JSON schemas)")
    if given.get("continue_final_message") and given.get("add_generation_prompt"):
        raise DataError(
            "continue_final_message leaves no room for add_generation_prompt; give one of the two"
        )
    given.setdefault("add_generation_prompt", True)
    try:
        chat = [_plain(message) for message in messages]
        given = _plain(given)
    except RecursionError:
        raise DataError("the messages or template arguments are nested too deeply") from None
    if wrong := [message for message in chat if not isinstance(message, dict)]:
        raise DataError(f"a message is {str(wrong[0])[:80]!r}; give objects with a role and content")
    return [_with_reasoning(message) for message in chat], given


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is None, and its thoughts under the names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A value of JSON's types alone; anything else becomes its type's name.

    An object of another class would offer its methods to the template.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__pos__(value)
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value] if isinstance(value, list) else tuple(map(_plain, value))
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic's models
        return _plain(dump())
    return f"<{type(value).__name__}>"


def _open_last(chat: list[dict[str, Any]], field: str, source: str) -> str:
    """Mark the end of the last message's text, in place; returns that text."""
    fields = [field]
    final = chat[-1].get(field) if chat else None
    if field in _REASONING:
        fields = [name for name in _REASONING if chat and chat[-1].get(name) == final]
    if final is None or not any(name in source for name in fields):
        what = "no message has" if final is None else "the chat template doesn't read"
        raise DataError(f"continue_final_message asks to go on in {field!r}, which {what} at the end")
    if isinstance(final, (list, tuple)):
        blocks = [block for block in final if isinstance(block, dict) and "text" in block]
        if not blocks:
            raise DataError("continue_final_message finds no text in the last message")
        final = str(blocks[-1]["text"])
        blocks[-1]["text"] = final + _TAG
        return final
    for name in fields:
        chat[-1][name] = f"{final}{_TAG}"
    return str(final)


def _cut(text: str, final: str) -> str:
    """The text up to the mark at the end of the last message."""
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise DataError(
            "continue_final_message: the chat template leaves out or changes the end of the last message"
        )
    # Where the mark lost its blank, the template trims what it shows.
    return text[:at] if text[at : at + len(_TAG)] == _TAG else text[:at].rstrip()


def _first_line(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(cause).__name__
