"""jinja2's sandbox with bounds on what a template may cost: steps, characters, seconds.

A bundle's chat template is code of a stranger's. jinja2's sandbox keeps it from the system, not from
computing for ever or filling the memory: two nested loops, a string doubled thirty times, `'a' * 10 ** 9`. So
every turn of a loop and every call is counted, every piece of text is measured, and what could grow by a
factor is measured before it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from vera_edge.device.runtime.meter import (
    MAX_AT_ONCE,
    TooMuchError,
    check_size,
    counted,
    current,
    held_items,
    length_of,
    size_of,
)

_MAX_BITS = 1 << 16  # of a whole number
# Filters and methods of strings that make what a number among their arguments says.
_SIZED = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "round", "tojson"}
# Filters that look at a value's parts and not at its text: it needn't be measured for them.
_STRUCTURAL = {
    *("abs", "attr", "batch", "count", "d", "default", "first", "float", "int", "items", "last", "length"),
    *("list", "map", "random", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice"),
}
# Filters whose time grows faster than the text does: the longest text that they take.
_SLOW = {"wordwrap": 1 << 16, "urlize": 1 << 20, "striptags": 1 << 20}
# A width of six digits, or one that an argument gives, in "%6d" or "{:6}".
_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)|\{[^{}]*:[^{}]*(\d{6}|\{)")


class MeteredEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose templates render within `metered` only, at a bounded cost."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False)  # nothing is computed on compiling
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.add_filter("sum", _sum)
        self.filters |= {"_turns": _turns, "_shown": _shown, "_joined": _joined, "_compared": _compared}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: _weighed(function) for name, function in tests.items()}
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
        result = super().call_binop(context, operator, left, right)
        # A text that grows in a loop is made anew in each turn, and only the last one stays.
        current().spend(length_of(result) // (8 if isinstance(result, str) else 1))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item by its key, unless that is too large to be looked up."""
        return super().getitem(obj, _checked(argument))

    # jinja2 names these two with underscores, so that a template's keyword arguments can't meet them.
    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call, counted."""
        current().spend()
        if isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (_turns(__context, args[0]), *args[1:])  # a recursive loop
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            args = tuple(held_items(arg) for arg in args)
            _check_growth(__obj.__name__, owner, args, kwargs)
        elif not isinstance(__obj, jinja2.runtime.Macro):  # what else is called may compare and look up
            for value in (*args, *kwargs.values(), *([owner] if isinstance(owner, (list, tuple)) else ())):
                _checked(value)
        result = super().call(__context, __obj, *args, **kwargs)
        if not isinstance(__obj, jinja2.runtime.Macro):  # what a macro shows was counted
            current().spend(length_of(result))
        return result


class _Counted(jinja2.visitor.NodeTransformer):
    """Puts a filter around what loops turn over, what is shown, joined by `~`, compared, or a key."""

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

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Compare:
        self.generic_visit(node)
        node.expr = self._filtered("_compared", node.expr)
        for operand in node.ops:
            operand.expr = self._filtered("_compared", operand.expr)
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> jinja2.nodes.Pair:
        self.generic_visit(node)
        node.key = self._filtered("_compared", node.key)
        return node


# `pass_context` keeps jinja2 from computing these when it compiles.
@jinja2.pass_context
def _turns(_: Any, values: Any) -> Iterator[Any]:
    """The items of `values`, each counted; raises at once when it has none to give, as a loop does."""
    return counted(iter(values))


@jinja2.pass_context
def _shown(_: Any, value: Any) -> str:
    """The text of a value, measured."""
    current().spend(size_of(value))
    return str(value)


@jinja2.pass_context
def _joined(_: Any, values: list[Any]) -> str:
    """`a ~ b`, measured."""
    current().spend(sum(map(size_of, values)))
    return "".join(map(str, values))


@jinja2.pass_context
def _compared(_: Any, value: Any) -> Any:
    """What is compared or looked up."""
    return _checked(value)


def _checked(value: Any) -> Any:
    """The value, unless comparing it takes too long: a list that holds one list twice is compared twice."""
    if isinstance(value, (list, tuple, dict, set)):
        size_of(value)
    return value


def _weighed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test of jinja2's that counts, and refuses what would take too long."""

    @wraps(function)
    def weighed(*args: Any, **kwargs: Any) -> Any:
        current().spend()
        for value in (*args, *kwargs.values()):
            _checked(value)
        return function(*args, **kwargs)

    return weighed


@jinja2.pass_environment
def _sum(environment: Any, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's `sum`, added up by the operator that is measured."""
    if attribute is not None:
        iterable = map(jinja2.filters.make_attrgetter(environment, attribute), iterable)
    for value in iterable:
        start = environment.call_binop(None, "+", start, value)
    return start


def _measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's that counts, and refuses what would grow too large."""
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.spend()
        if len(args) > first:
            held = held_items(args[first]) if name == "join" else args[first]
            if name not in _STRUCTURAL and size_of(held) > _SLOW.get(name, MAX_AT_ONCE):
                raise TooMuchError(f"{name} gets a text of more than {_SLOW[name]} characters")
            args = (*args[:first], held, *args[first + 1 :])
            _check_growth(name, held, args[first + 1 :], kwargs)
        result = function(*args, **kwargs)
        meter.spend(length_of(result))
        return result

    return measured


def _check_growth(name: str, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Refuse what could make `value` as many times longer as a text or a number among the arguments says."""
    given = [*args, *named.values()]
    if name == "join":  # a filter of parts, or a method of what stands between them
        parts = given.pop(0) if isinstance(value, str) and given else value
        lengths = [length_of(text) for text in (value, *given) if isinstance(text, str)]
        check_size(size_of(parts) + length_of(parts) * max(lengths, default=0))
    elif name in ("format", "format_map"):
        _check_form(value, given)
    else:
        texts = [len(text) for arg in given for text in _texts(arg)]
        numbers = [abs(arg) for arg in given if type(arg) is int and name in _SIZED]
        if factor := max([*texts, *numbers], default=0):
            check_size(max(1, size_of(value) if name == "tojson" else length_of(value)) * factor)


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
        bits = {
            "+": 0,
            "*": left.bit_length() + right.bit_length(),
            "**": left.bit_length() * abs(right),
        }
        if bits[operator] > _MAX_BITS:
            raise TooMuchError(f"{operator} makes a number of {bits[operator]} bits")
    elif operator == "+":
        check_size(length_of(left) + length_of(right))
    elif operator == "*":
        for many, count in ((left, right), (right, left)):
            if isinstance(count, int):
                check_size(length_of(many) * max(0, count))


def _check_form(form: Any, values: Any) -> None:
    """Refuse "%6d" % value and "{:6}".format(value) when they can grow large."""
    if isinstance(form, str):
        if _WIDTH.search(form):
            raise TooMuchError("a format asks for a width that it can't have here")
        check_size(size_of(values) * max(1, form.count("%") + form.count("{")))
