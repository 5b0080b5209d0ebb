"""The words of --trained-as, and what they stand for in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_edge.base.trained_as import TrainedAs, parse
from vera_edge.base.trained_as.spec import DTYPES, FOUR_BIT, STORAGES
from vera_edge.errors import PlanError

_dtypes = st.sampled_from(sorted(DTYPES))
_names = st.from_regex(r"[a-z0-9_.*]{1,12}", fullmatch=True)


@st.composite
def specs(draw: st.DrawFn) -> TrainedAs:
    kind = draw(st.sampled_from([*FOUR_BIT, "int8", "float"]))
    dtype = draw(st.none() | _dtypes)
    skip = tuple(draw(st.lists(_names, max_size=2))) if kind != "float" else ()
    if kind not in FOUR_BIT:
        return TrainedAs(kind, dtype, skip=skip)
    return TrainedAs(kind, dtype, draw(st.booleans()), draw(_dtypes), draw(st.sampled_from(STORAGES)), skip)


@given(specs())
def test_what_is_written_reads_back(spec: TrainedAs) -> None:
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("nf4", TrainedAs("nf4")),
        ("fp4", TrainedAs("fp4")),
        ("int8", TrainedAs("int8")),
        ("float", TrainedAs("float")),
        ("bf16", TrainedAs("float", "bfloat16")),
        ("fp16", TrainedAs("float", "float16")),
        ("fp32", TrainedAs("float", "float32")),
        ("nf4,double,compute=bf16", TrainedAs("nf4", None, True, "bfloat16")),
        (
            "nf4,double,compute=bfloat16,storage=bf16,skip=lm_head",
            TrainedAs("nf4", None, True, "bfloat16", "bfloat16", ("lm_head",)),
        ),
        (" nf4 , skip = a.b , skip = c , dtype = fp16 ", TrainedAs("nf4", "float16", skip=("a.b", "c"))),
    ],
)
def test_words(text: str, spec: TrainedAs) -> None:
    assert parse(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "'' isn't a way to load a base; choose nf4, fp4, int8, float, .*load_in_4bit=True alone is fp4",
        ),
        ("4bit", "'4bit' isn't a way to load a base"),
        ("NF4", "'NF4' isn't a way"),
        ("double", "'double' isn't a way"),
        ("nf4,dubble", "'dubble' says nothing of how a base was loaded; after nf4 may come double, compute="),
        ("nf4,", "'' says nothing"),
        ("nf4,compute", "'compute' says nothing"),
        ("nf4,compute=", "a compute dtype can't be ''; choose float32, bfloat16 or float16"),
        ("nf4,compute=fp8", "a compute dtype can't be 'fp8'"),
        ("nf4,storage=int4", "a storage can't be 'int4'; choose uint8, float32, bfloat16 or float16"),
        ("nf4,dtype=float64", "a dtype can't be 'float64'"),
        ("nf4,double,double", "double stands twice"),
        ("nf4,compute=bf16,compute=fp16", "compute stands twice"),
        ("bf16,dtype=fp16", "dtype stands twice"),
        ("nf4,skip=", "skip= needs the name of a module"),
        ("int8,double", "double belongs to nf4 and fp4; leave it out beside int8"),
        ("int8,compute=bf16", "a compute dtype belongs to nf4 and fp4"),
        ("bf16,storage=bf16", "a storage belongs to nf4 and fp4"),
        ("float,skip=lm_head", "float quantizes none"),
    ],
)
def test_what_it_is_not(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse(text)


@given(specs())
def test_transformers_reads_the_config_and_writes_it_again(spec: TrainedAs) -> None:
    from transformers import BitsAndBytesConfig

    written = spec.quantization_config()
    if written is None:
        assert spec.format == "float"
        return
    assert BitsAndBytesConfig.from_dict(dict(written)).to_dict() == written


@given(specs())
def test_the_call_is_what_it_stands_for(spec: TrainedAs) -> None:
    """As Python evaluates it."""
    import torch
    from transformers import BitsAndBytesConfig

    given: dict[str, Any] = eval(
        f"dict({spec.call})", {"torch": torch, "BitsAndBytesConfig": BitsAndBytesConfig}
    )
    config = given.get("quantization_config")
    assert (None if config is None else config.to_dict()) == spec.quantization_config()
    assert given.get("dtype") == (None if spec.dtype is None else getattr(torch, spec.dtype))
