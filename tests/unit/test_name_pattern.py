"""Patterns of names: as `re.match` has them, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vera_edge.name_pattern import NamePattern

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.31.mlp.down_proj",
    "lm_head",
    "model.layers.7.mlp.experts.3.w1",
    "",
    "a",
    "a\n",
)
PATTERNS = (
    ".*self_attn.*",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj$",
    ".*lm_head",
    r"^(?!.*experts).*mlp.*proj$",
    r".*mlp.*experts\..*w[13]$",
    r"model\.layers\.(?:[0-9]|1[0-9])\..*",
    r"(.*\.)*q_proj",
    "[^.]+",
    r"\w+$",
    "a$",
    "a?",
    r"(?:model\.)?layers.*|lm_head",
    r"model(\.\w+)+\.(q|k|v)_proj",
    r".{3,5}\..*\..*\..*_proj",
    ".*?mlp.*?down.*?",
)


@pytest.mark.parametrize("text", PATTERNS)
def test_real_patterns_match_as_re_does(text: str) -> None:
    for name in NAMES:
        assert NamePattern(text).matches(name) == bool(re.match(text, name)), name


parts = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", "^", "$", "(?!b)", "(?=a)"]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        )
        | st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})")
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(text=parts, name=st.text("ab1.\n", max_size=7))
def test_any_pattern_matches_as_re_does(text: str, name: str) -> None:
    assert NamePattern(text).matches(name) == bool(re.match(text, name))


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(a|a)*$",
        "(a|aa)+$",
        "(.*a){12}$",
        "((a*)*)*$",
        ".*.*.*.*.*.*.*x",
        "a*a*a*a*a*a*a*b",
        "(?:a?){60}a{60}$",
        "(a+)+(?!a)b",
        "(?=(a+)+b)",
    ],
)
def test_no_pattern_takes_long(text: str) -> None:
    """`(a+)+$` took 1.3 s for 24 letters and twice that for each one more."""
    for name in ("a" * 200 + "!", "model.layers." * 15):
        start = time.process_time()
        NamePattern(text).matches(name)
        assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(", "no regular expression"),
        ("a" * 600, "longer than 512"),
        ("(" * 300 + ")" * 300, ""),
        ("(a)\\1", "a part other"),
        ("(?<=a)b", "a part other"),
        ("a{1000}", "over 64 repeats"),
        ("(?i)a", "sets flags"),
        ("(?i:a)", "sets flags"),
        ("a{99999999999}", "no regular expression"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    try:
        NamePattern(text).matches("a")
    except ValueError as cause:
        assert said in str(cause)
    else:
        assert not said


def test_a_name_longer_than_any() -> None:
    with pytest.raises(ValueError, match="a name of 9999 characters"):
        NamePattern("a").matches("a" * 9999)
