"""A stranger's template can't compute for ever, fill the memory or get out of its sandbox."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vera_edge.device.runtime import meter
from vera_edge.device.runtime.template import ChatTemplate
from vera_edge.errors import BundleError

USER = {"role": "user", "content": "Hi"}
# Two lists, of which each holds one list twice, sixty times over.
_SHARED = (
    "{% set ns = namespace(a=[], b=[], c=()) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% set ns.c = (ns.c, ns.c) %}{% endfor %}"
)
BOMBS = {
    "lists compared": _SHARED + "{{ ns.a == ns.b }}",
    "a list in a list": _SHARED + "{{ ns.a in [ns.b] }}",
    "a list looked for": _SHARED + "{{ [ns.b].index(ns.a) }}",
    "lists sorted": _SHARED + "{{ [ns.a, ns.b] | sort | length }}",
    "lists made unique": _SHARED + "{{ [ns.a, ns.b] | unique | list | length }}",
    "the largest of lists": _SHARED + "{{ [ns.a, ns.b] | max }}",
    "lists tested": _SHARED + "{{ ns.a is eq(ns.b) }}",
    "lists selected": _SHARED + "{{ [ns.a] | select('equalto', ns.b) | list }}",
    "a key": _SHARED + "{% set d = {ns.c: 1} %}",
    "a key that is looked up": _SHARED + "{{ {1: 2}[ns.c] }}",
    "a key that is got": _SHARED + "{{ {1: 2}.get(ns.c) }}",
    "a key of dict's": _SHARED + "{{ dict([[ns.c, 1]]) }}",
    "lists summed": "{{ ([[1] * 10 ** 4] * 10 ** 4) | sum(start=[]) | length }}",
    "long lines": "{{ ('a' * 10 ** 7) | wordwrap(1) | length }}",
    "large strings kept": "{% set ns = namespace(s=[]) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ['a' * 33000000] %}{% endfor %}",
    "many names": "".join(f"{{% set a{i} = 1 %}}" for i in range(10**5)),
    "a sum of one": "{{ " + "+".join(["1"] * 20000) + " }}",
    "one attribute of another": "{{ messages" + ".a" * 20000 + " }}",
    "a loop": "{% for i in range(10 ** 6) %}x{% endfor %}",
    "loops in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that show": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "a recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a recursive loop that ends late": "{% for i in range(40) recursive %}{% if loop.depth < 30 %}"
    "{{ loop(range(40)) }}{% endif %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a string doubled": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a string added to itself": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a block doubled": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "a list doubled": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a list of lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "a list of lists as JSON": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson | length }}",
    "a list of lists, joined": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ (ns.s ~ '') | length }}",
    "a list of lists, as text": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
    "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ '%s' % (ns.s,) }}{{ ns.s | upper }}",
    "a string many times": "{{ ('a' * 10 ** 10) | length }}",
    "many times a string": "{{ (10 ** 10 * 'a') | length }}",
    "a list many times": "{{ ([1] * 10 ** 10) | length }}",
    "a power": "{{ 9 ** (9 ** 9) % 7 }}",
    "a number squared": "{% set ns = namespace(n=3) %}{% for i in range(60) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a width from outside": "{{ '%*d' % (10 ** 10, 1) }}",
    "a width in a filter": "{{ '%9999999999d' | format(1) }}",
    "a width in a format": "{{ '{:>9999999999}'.format(1) }}",
    "a width in a format, from outside": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "an argument shown often": "{{ ('{0}' * 10 ** 6).format('a' * 10 ** 6) }}",
    "a centre": "{{ 'a' | center(10 ** 10) }}",
    "a method's centre": "{{ 'a'.center(10 ** 10) }}{{ 'a'.zfill(10 ** 10) }}",
    "tabs": "{{ ('\\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "an indent": "{{ ('\\n' * 10 ** 6) | indent(10 ** 6) }}",
    "an indent of JSON": "{{ [[[1]]] | tojson(indent=10 ** 10) }}",
    "a separator of JSON": "{{ ([1] * 10 ** 6) | tojson(separators=('a' * 10 ** 6, 'b')) }}",
    "a replacement": "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "a method's replacement": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "a table": "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
    "a joint": "{{ ([1] * 10 ** 6) | join('b' * 10 ** 6) }}",
    "a method's joint": "{{ ('b' * 10 ** 6).join(['a'] * 10 ** 6) }}",
    "a joint of long parts": "{{ (['a' * 10 ** 6] * 10 ** 6) | join }}",
    "rows": "{{ [1] | batch(10 ** 10, 1) | list | length }}",
    "columns": "{{ [1] | slice(10 ** 10) | list | length }}",
    "random words": "{{ lipsum(n=10 ** 6) }}",
    "blocks in blocks": "{% if true %}" * 4000 + "{% endif %}" * 4000,
    "brackets in brackets": "{{ " + "(" * 40000 + "1" + ")" * 40000 + " }}",
    "loops within loops": "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
    "a break outside": "{% break %}",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_template_that_takes_too_much_is_refused_in_one_sentence(what: str) -> None:
    template = ChatTemplate({"default": BOMBS[what]}, {})
    with pytest.raises(BundleError, match="the chat template fails") as caught:
        template.render([USER])
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert template.unread({"x": 1}) in (None, "x")


def test_a_template_has_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MAX_SECONDS", -1.0)
    with pytest.raises(BundleError, match=r"chat template fails \(it takes more than -1 seconds\)"):
        ChatTemplate({"default": "{{ messages }}"}, {}).render([USER])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages | attr('__class__') }}{{ (messages | attr('__class__')).mro() }}",
        "{{ ''['__class__'].mro() }}",
        "{{ namespace.__init__.__globals__ }}{{ namespace.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ self._TemplateReference__context.environment.globals.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ dict.__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(BundleError, match="the chat template fails"):
        ChatTemplate({"default": attack}, {}).render([USER])


def test_formats_reach_no_attributes() -> None:
    """They give nothing where the value would be."""
    source = "{{ ('{0.__class__}' | attr('format'))(1) }}{{ '{0.__class__}'.format(1) }}"
    source += "{{ '{x.__class__}'.format_map({'x': 1}) }}"
    assert ChatTemplate({"default": source}, {}).render([USER]) == ""


def test_jinja2_has_no_known_way_out_of_its_sandbox() -> None:
    """CVE-2024-56326 and CVE-2025-27516: `|attr` reached `str.format` before 3.1.6."""
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    needed = next(line for line in project["dependencies"] if line.startswith("jinja2"))
    lowest = re.search(r">=(\d+)\.(\d+)\.(\d+)", needed)
    assert lowest is not None and tuple(map(int, lowest.groups())) >= (3, 1, 6)
