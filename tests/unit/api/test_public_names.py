"""What `vera_edge` offers: told to type checkers as it is at run time, and by the names of the options."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import vera_edge
from vera_edge.cli import COMMANDS, export, main
from vera_edge.exporting import target as targets
from vera_edge.exporting.exporter import WithFormats

# What a command's function has for parameters that stand for the command's arguments, not its options.
POSITIONAL = {
    "base",
    "adapter",
    "adapters",
    "reference",
    "artefact",
    "artefacts",
    "bundle",
    "src",
    "dst",
    "patch",
    "old",
    "new",
}
POSITIONAL |= {"recipe", "source"}
# How the terminal is used is the command's own business.
OF_THE_TERMINAL = {"json", "quiet"}
OF_THE_SHELL = {"completion"}  # about the command line itself
# command -> its function, where that has another name
FUNCTIONS = {
    "run": "open_bundle",
    "release make": "release",
    "release rebuild": "rebuild",
    "adapter pack": "pack_adapter",
    "adapter freeze": "freeze_adapter",
    "adapter diff": "diff_adapters",
    "adapter list": "read_manifest",
    "adapter to-lora": "to_lora",
    "adapter combine": "combine_adapters",
}
# Options that are something else in Python, and why.
OTHERWISE = {
    ("drift", "engine"): "of a function of its own, drift_each, as it gives several reports",
    ("drift", "ray_address"): "likewise",
    ("merge", "each"): "a function of its own, merge_each, as it gives several reports",
    ("export", "dry_run"): "a function of its own, plan_export, as it gives a plan",
    ("merge", "dry_run"): "functions of their own, plan_merge and plan_merge_each, as they give plans",
    ("merge", "adapter"): "the second argument takes several adapters",
    ("export", "adapter"): "the second argument takes several adapters",
    ("plan", "adapter"): "the second argument takes several adapters",
    ("export", "for"): "a keyword of Python: device",
    ("export", "onnx"): "says nothing: it is the default",
    ("release make", "dry_run"): "a function of its own, plan_release, as it gives jobs",
    ("adapter pack", "for"): "a keyword of Python: the second argument",
    ("adapter freeze", "for"): "a keyword of Python: the second argument",
}


def imported_for_type_checkers() -> set[tuple[str, str]]:
    tree = ast.parse(Path(str(vera_edge.__file__)).read_text(encoding="utf-8"))
    return {
        (str(node.module).removeprefix("vera_edge."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vera_edge.")
        for alias in node.names
    }


def test_type_checkers_are_told_what_there_is() -> None:
    there = {(module, name) for module, names in vera_edge._PUBLIC.items() for name in names}
    assert imported_for_type_checkers() == there
    assert vera_edge.__all__ == sorted(name for _, name in there)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in vera_edge.__all__:
        assert getattr(vera_edge, name).__name__ == name
        assert name in dir(vera_edge)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vera_edge.nonsense  # type: ignore[attr-defined]  # noqa: B018


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something to a model, by the words that call it."""
    context = click.Context(main)
    for name in COMMANDS:
        if name in OF_THE_SHELL:
            continue
        command = main.get_command(context, name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            assert command is not None
            yield name, command


def options(command: click.Command) -> dict[str, click.Option]:
    """A command's options by their first long name, as Python would write it."""
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            long = [name for name in parameter.opts if name.startswith("--")]
            name = "out" if "--out" in long else long[0].removeprefix("--")
            found[name.replace("-", "_")] = parameter
    return found


@pytest.mark.parametrize(("words", "command"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_a_function_takes_what_its_command_takes(words: str, command: click.Command) -> None:
    function = getattr(vera_edge, FUNCTIONS.get(words, words))
    taken = dict(inspect.signature(function).parameters)
    asked = {name for name in options(command).keys() - OF_THE_TERMINAL if (words, name) not in OTHERWISE}
    asked = {{"template_arg": "template_args"}.get(name, name) for name in asked}
    if words == "run":  # how text is generated is asked of what was opened
        taken |= inspect.signature(vera_edge.Session.generate).parameters
        asked -= {"system"}
    assert asked <= set(taken)
    for name, parameter in taken.items():
        if name not in POSITIONAL and words != "run":
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize(("words", "command"), [pytest.param(*each, id=each[0]) for each in commands()])
def test_an_option_left_out_is_an_argument_left_out(words: str, command: click.Command) -> None:
    taken = inspect.signature(getattr(vera_edge, FUNCTIONS.get(words, words))).parameters
    shared = {name for name in options(command) if name in taken and (words, name) not in OTHERWISE}
    for name in shared - {name for name, each in taken.items() if each.default is each.empty}:
        ours, theirs = taken[name].default, options(command)[name].get_default(click.Context(command))
        if not isinstance(theirs, str | float | int | Path):  # click's word for none
            theirs = None
        if isinstance(theirs, str) and not isinstance(ours, str):  # a list, with commas
            theirs = tuple(theirs.split(",")) if theirs else ()
        assert (theirs or None) == (ours or None) or str(theirs) == ours, name


def test_the_weights_of_an_export_are_those_of_the_library() -> None:
    assert set(export.ONNX_WEIGHTS.split(", ")) == set(targets.WEIGHTS)
    gguf = targets.find("gguf")
    assert isinstance(gguf, WithFormats)
    # What other targets call float32 and float16 is taken too.
    assert {*export.GGUF_WEIGHTS.split(", "), "fp32", "fp16"} == set(gguf.weights)


def test_every_difference_between_option_and_argument_is_still_one() -> None:
    found = dict(commands())
    for words, name in OTHERWISE:
        assert name in options(found[words]), (words, name)


@pytest.mark.parametrize("name", vera_edge.__all__)
def test_every_public_thing_is_documented(name: str) -> None:
    thing = getattr(vera_edge, name)
    text = inspect.getdoc(thing) or ""
    assert text
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert all(f"\n{part}:" in text for part in ("Args", "Returns", "Raises", "Example")), name
        explained = text.partition("\nArgs:")[2].partition("\nReturns:")[0]
        if "..." not in explained:
            missing = [each for each in signature.parameters if each not in explained]
            assert not missing
        example = [line for line in text.splitlines() if line.lstrip().startswith(">>>")]
        assert 1 <= len(example) <= 3


def test_every_function_is_typed() -> None:
    for name in vera_edge.__all__:
        thing = getattr(vera_edge, name)
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not inspect.Signature.empty
            assert all(each.annotation is not each.empty for each in signature.parameters.values())
