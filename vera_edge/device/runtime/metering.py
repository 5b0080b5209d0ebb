"""jinja2's sandbox with bounds on what a template may cost: steps, characters, seconds.

A bundle's chat template is code of a stranger's. jinja2's sandbox keeps it from the system, not from
computing for ever or filling the memory: two nested loops, a string doubled thirty times, `'a' * 10 ** 9`. So
every turn of a loop and every call is counted, every piece of text is measured, and what could grow by a
factor is measured before it is made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

MAX_STEPS = (
    2_000_000  # turns of loops, calls, filters and pieces of text; a long chat takes some ten thousand
)
MAX_CHARACTERS = 1 << 26  # of all that is put out or captured; a million tokens are 4 million
MAX_AT_ONCE = 1 << 25  # characters or items of one value
MAX_SECONDS = 20.0
_MAX_BITS = 1 << 16  # of a whole number
# Filters and methods of strings that make what a number among their arguments says.
_SIZED = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "round", "tojson"}
# Filters that look at a value's parts and not at its text: it needn't be measured for them.
_STRUCTURAL = {
    *(
        "abs",
        "attr",
        "batch",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "float",
        "groupby",
        "int",
        "items",
    ),
    *("last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round"),
    *("select", "selectattr", "slice", "sort", "sum", "unique"),
}
# A width of six digits, or one that an argument gives, in "%6d" or "{:6}".
_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)|\{[^{}]*:[^{}]*(\d{6}|\{)")


class TooMuchError(jinja2.TemplateError):
    """A template took more than it may."""


class Meter:
    """What one rendering has left."""

    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS
        self.end = time.monotonic() + MAX_SECONDS

    def spend(self, characters: int = 0) -> None:
        """Count one step that made `characters`. Raises TooMuchError once nothing is left."""
        self.steps -= 1
        self.characters -= characters
        if self.steps < 0:
            raise TooMuchError(f"it takes more than {MAX_STEPS} steps")
        if self.characters < 0:
            raise TooMuchError(f"it makes more than {MAX_CHARACTERS} characters")
        if time.monotonic() > self.end:
            raise TooMuchError(f"it takes more than {MAX_SECONDS:.0f} seconds")


_meter: ContextVar[Meter] = ContextVar("meter")


@contextmanager
def metered() -> Iterator[None]:
    """Give what renders within a fresh meter."""
    token = _meter.set(Meter())
    try:
        yield
    finally:
        _meter.reset(token)


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose templates render within `metered` only, at a bounded cost."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False)  # nothing is computed on compiling
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters |= {"_turns": _turns, "_shown": _shown, "_joined": _joined}
        del self.globals["lipsum"]  # random words, as many as asked for

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Let templates call `function` as a filter, counted and measured."""
        self.filters[name] = _measured(name, function)

    def compiled(self, tree: jinja2.nodes.Template) -> jinja2.Template:
        """A template of a syntax tree (`Environment.parse`), which is changed."""
        _Counted(self).visit(tree)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None), None)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, unless its result is too large."""
        _check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    # jinja2 names these two with underscores, so that a template's keyword arguments can't meet them.
    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call, counted."""
        _meter.get().spend()
        if isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (_turns(__context, args[0]), *args[1:])  # a recursive loop
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            args = tuple(_held(arg) for arg in args)
            _check_growth(__obj.__name__, owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if not isinstance(__obj, jinja2.runtime.Macro):  # what a macro shows was counted
            _meter.get().spend(_length(result))
        return result


class _Counted(jinja2.visitor.NodeTransformer):
    """Puts a filter around what loops turn over, what is shown and what `~` joins."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def _filtered(self, name: str, node: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
        wrapped = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        wrapped.set_environment(self.environment)
        return wrapped

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        node.iter = self._filtered("_turns", node.iter)  # type: ignore[arg-type]
        return node

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Output:
        self.generic_visit(node)
        node.nodes = [self._filtered("_shown", child) for child in node.nodes]
        return node

    def visit_TemplateData(self, node: jinja2.nodes.TemplateData) -> jinja2.nodes.Const:
        return jinja2.nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
        self.generic_visit(node)
        parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return self._filtered("_joined", parts)


# `pass_context` keeps jinja2 from computing these when it compiles.
@jinja2.pass_context
def _turns(_: Any, values: Any) -> Iterator[Any]:
    """The items of `values`, each counted; raises at once when it has none to give, as a loop does."""
    return _counted(iter(values))


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    meter = _meter.get()
    for value in values:
        meter.spend()
        yield value


@jinja2.pass_context
def _shown(_: Any, value: Any) -> str:
    """The text of a value, measured."""
    _meter.get().spend(_size(value))
    return str(value)


@jinja2.pass_context
def _joined(_: Any, values: list[Any]) -> str:
    """`a ~ b`, measured."""
    _meter.get().spend(sum(map(_size, values)))
    return "".join(map(str, values))


def _measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's that counts, and refuses what would grow too large."""
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        meter.spend()
        if len(args) > first:
            held = _held(args[first]) if name == "join" else args[first]
            if name not in _STRUCTURAL:
                _size(held)
            args = (*args[:first], held, *args[first + 1 :])
            _check_growth(name, held, args[first + 1 :], kwargs)
        result = function(*args, **kwargs)
        meter.spend(_length(result))
        return result

    return measured


def _check_growth(name: str, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Refuse what could make `value` as many times longer as a text or a number among the arguments says."""
    given = [*args, *named.values()]
    if name == "join":  # a filter of parts, or a method of what stands between them
        parts = given.pop(0) if isinstance(value, str) and given else value
        lengths = [_length(text) for text in (value, *given) if isinstance(text, str)]
        _check_size(_size(parts) + _length(parts) * max(lengths, default=0))
    elif name in ("format", "format_map"):
        _check_form(value, given)
    else:
        texts = [len(text) for arg in given for text in _texts(arg)]
        numbers = [abs(arg) for arg in given if type(arg) is int and name in _SIZED]
        if factor := max([*texts, *numbers], default=0):
            _check_size(max(1, _size(value) if name == "tojson" else _length(value)) * factor)


def _texts(argument: Any) -> list[str]:
    """The strings of an argument, one level down too."""
    entries = argument.values() if isinstance(argument, dict) else argument
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        entries = [argument]
    return [text for text in entries if isinstance(text, str)]


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str):
            _check_form(left, right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = {"+": 0, "*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}
        if bits[operator] > _MAX_BITS:
            raise TooMuchError(f"{operator} makes a number of {bits[operator]} bits")
    elif operator == "+":
        _check_size(_length(left) + _length(right))
    elif operator == "*":
        for many, count in ((left, right), (right, left)):
            if isinstance(count, int):
                _check_size(_length(many) * max(0, count))


def _check_form(form: Any, values: Any) -> None:
    """Refuse "%6d" % value and "{:6}".format(value) when they can grow large."""
    if isinstance(form, str):
        if _WIDTH.search(form):
            raise TooMuchError("a format asks for a width that it can't have here")
        _check_size(_size(values) * max(1, form.count("%") + form.count("{")))


def _check_size(size: int) -> None:
    if size > MAX_AT_ONCE:
        raise TooMuchError(f"it makes more than {MAX_AT_ONCE} characters at once")


def _held(value: Any) -> Any:
    """An iterator's items as a list, so that they can be measured; else the value."""
    return list(_counted(value)) if isinstance(value, Iterator) else value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set)) else 0


def _size(value: Any) -> int:
    """About the characters of a value's text. Raises TooMuchError when it is too large to be written.

    A list that holds one list many times is short in memory and long as text.
    """
    size = len(value) if isinstance(value, str) else _weigh(value, {})
    _check_size(size)
    return size


def _weigh(value: Any, known: dict[int, int]) -> int:
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, Mapping):
        parts: Iterable[Any] = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set)):
        parts = value
    else:
        return 8
    if id(value) not in known:
        known[id(value)] = 2 + sum(2 + _weigh(part, known) for part in parts)
    return known[id(value)]
