#!/usr/bin/env python
"""Writes docs/api.md: the public interface, from its docstrings.

python -m scripts.make_api_page
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vera_edge
from vera_edge import errors, training

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """\
# The Python interface

`import vera_edge` offers a function for each command; its keyword arguments have the names of the command's
options, and its result has what the command prints (`to_dict()` is what `--json` prints). Nothing is printed:
`progress` is called with how far the work is, `tell` with sentences for a person, and results have `notes`.
All is imported when it is first asked for, so that `import vera_edge` takes a millisecond, and the functions
of the device never load torch.

A path (`StrPath`) is a string or a `Path`. Where several adapters can be given (`Adapters`), one folder is
one adapter, and `{folder: weight}` or a list of folders or of `(folder, weight)` are several.

The examples are run by a test, in a folder with a float model `model`, its NF4 base `base` and one in GPTQ,
`integers`, a PEFT folder `adapter`, the branch export `bundle` with golden vectors, a later one, `newer`, and
an encoder's, `embedder`.
This page is written by `scripts/make_api_page.py`.
"""
# Title -> what is in it, in the order a newcomer meets them; what is in none comes under results or errors.
GROUPS = {
    "Base and adapter": (
        "inspect",
        "projections",
        "quantize",
        "adapt",
        "to_lora",
        "combine_adapters",
        "diff_adapters",
    ),
    "Merge": ("merge", "merge_each", "plan_merge", "plan_merge_each"),
    "Export": ("export", "plan_export", "plan", "golden", "pack_adapter", "freeze_adapter"),
    "Drift": ("drift", "drift_each"),
    "Bundles": ("verify", "read_manifest", "sign", "diff"),
    "On the device": (
        *("open_bundle", "Session", "Encoder"),
        *("install", "update", "rollback", "patch", "fetch", "validate", "bench"),
    ),
    "Releases": ("release", "plan_release", "rebuild"),
}
# Beside the commands: imported by itself, since what it gives is a model of torch's.
TRAINING = """\
## Training

`from vera_edge.training import load` comes with torch (`pip install 'vera-edge[build]'`); see
[training.md](training.md).
"""
_SECTION = re.compile(r"^(Args|Returns|Raises|Example):$", re.MULTILINE)
_TITLES = {"Args": "Arguments"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_thing(name, getattr(vera_edge, name)) for name in names]
    parts.append(TRAINING)
    parts += [_thing(f"training.{name}", getattr(training, name)) for name in training.__all__]
    grouped = {name for names in GROUPS.values() for name in names}
    rest = [name for name in vera_edge.__all__ if name not in grouped]
    parts.append("## What they take and give\n")
    parts += [_thing(name, getattr(vera_edge, name)) for name in rest if not _is_error(name)]
    parts.append(f"## Errors\n\n```\n{_errors()}\n```\n")
    return "\n".join(parts)


def _is_error(name: str) -> bool:
    thing = getattr(vera_edge, name)
    return isinstance(thing, type) and issubclass(thing, Exception)


def _errors() -> str:
    """The tree of errors, without the sentence above it."""
    return (inspect.getdoc(errors) or "").partition("\n\n")[2].strip()


def _thing(name: str, thing: Any) -> str:
    if not isinstance(thing, type):
        return f"### {name}\n\n{_signature(name, thing)}\n{_document(thing)}"
    parts = [f"### {name}\n\n{_document(thing)}"]
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    if shown := [field for field in fields if not field.name.startswith("_")]:
        lines = [f"{field.name}: {field.type}" for field in shown]
        parts.append("```python\n" + "\n".join(lines) + "\n```\n")
    parts += [_member(name, *member) for member in _members(thing)]
    return "\n".join(parts)


def _members(thing: type) -> Iterator[tuple[str, Any]]:
    """Documented methods and properties of a class and those it comes from, in the order they are written."""
    classes = [one for one in reversed(thing.__mro__) if one.__module__.startswith("vera_edge")]
    seen = {name: value for one in classes for name, value in vars(one).items() if not name.startswith("_")}
    for name, value in seen.items():
        found = getattr(value, "__func__", value)
        if inspect.isfunction(found) or isinstance(found, property):
            yield name, found


def _member(owner: str, name: str, member: Any) -> str:
    if isinstance(member, property):
        getter = member.fget
        kind = inspect.signature(getter).return_annotation if getter else ""
        return f"```python\n{owner}.{name}: {kind}\n```\n{_document(member)}"
    return f"{_signature(f'{owner}.{name}', member)}{_document(member)}"


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    given = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    words, starred = [], False
    for each in given:
        if each.kind is each.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(_parameter(each))
    line = f"{name}({', '.join(words)}) -> {signature.return_annotation}"
    if len(line) > 100:
        line = (
            f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f") -> {signature.return_annotation}"
        )
    return f"```python\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    word = f"{stars}{parameter.name}: {parameter.annotation}"
    if parameter.default is parameter.empty:
        return word
    default = parameter.default
    name = getattr(default, "__name__", "") if callable(default) else repr(default)
    return f"{word} = {'...' if name == '<lambda>' else name}"


def _document(thing: Any) -> str:
    """A docstring in Markdown."""
    text = inspect.getdoc(thing) or ""
    head, *sections = _SECTION.split(text)
    parts = [head.strip(), ""]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines = inspect.cleandoc(body).splitlines()
        if title == "Example":
            parts += ["```python", *lines, "```", ""]
        elif title == "Returns":
            parts += [f"**{title}** {' '.join(line.strip() for line in lines)}", ""]
        else:
            parts += [f"**{_TITLES.get(title, title)}**", "", *_items(lines), ""]
    return "\n".join(parts)


def _items(lines: list[str]) -> Iterator[str]:
    """Entries `names: words`, of one line or more, as a list."""
    for line in lines:
        names, colon, words = line.partition(": ")
        if line.startswith(" "):
            yield f"  {line.strip()}"
        elif colon:
            quoted = ", ".join(f"`{name}`" if name != "..." else name for name in names.split(", "))
            yield f"* {quoted}: {words}"
        else:
            yield f"* {line}"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
