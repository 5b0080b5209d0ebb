"""Projections against PEFT and torch themselves, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from safetensors.numpy import load_file

from tests import kernels, tiny
from vera_edge.adapters.projection import (
    MAX_SIDE,
    ROUNDINGS,
    Projections,
    ProjectionSpec,
    regenerate,
    round_to,
    stream,
    stream_digest,
    write,
)
from vera_edge.errors import AdapterError, MismatchError, OutputError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "projections.json").read_text())
SPEC = ProjectionSpec(seed=3, rank=6, in_max=48, out_max=32)

specs = st.builds(
    ProjectionSpec,
    seed=st.integers(-(2**63), 2**64 - 1),
    rank=st.integers(1, 40),
    in_max=st.integers(1, 60),
    out_max=st.integers(1, 60),
    rounding=st.sampled_from(ROUNDINGS),
    fused=st.booleans(),
)


def bits(array: Any) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.ascontiguousarray(array).view(np.uint32)


def drawn_by_peft(spec: ProjectionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator("cpu").manual_seed(spec.seed)
    a = _kaiming_init((spec.rank, spec.in_max), generator=generator)
    b = _kaiming_init((spec.out_max, spec.rank), generator=generator)
    dtype = getattr(torch, spec.rounding)
    return a.to(dtype).float(), b.to(dtype).float()


@settings(max_examples=150, deadline=None)
@given(specs)
def test_equals_what_peft_draws(spec: ProjectionSpec) -> None:
    spec = replace(spec, fused=kernels.torch_fuses())
    a, b = drawn_by_peft(spec)
    ours = regenerate(spec)
    assert np.array_equal(bits(ours.a), bits(a.numpy()))
    assert np.array_equal(bits(ours.b), bits(b.numpy()))


def test_equals_what_peft_draws_over_several_chunks() -> None:
    spec = ProjectionSpec(seed=9, rank=300, in_max=5000, out_max=4000, fused=kernels.torch_fuses())
    a, b = drawn_by_peft(spec)
    ours = regenerate(spec)
    assert np.array_equal(bits(ours.a), bits(a.numpy()))
    assert np.array_equal(bits(ours.b), bits(b.numpy()))


def test_unfused_equals_torch_without_vector_instructions(tmp_path: Path) -> None:
    code = (
        "import sys, torch, numpy as np; from peft.tuners.vera.model import _kaiming_init as k;"
        "assert 'DEFAULT' in torch.__config__.show() or torch.backends.cpu.get_cpu_capability() == 'DEFAULT';"
        "g = torch.Generator().manual_seed(77);"
        "np.savez(sys.argv[1], a=k((16, 500), generator=g).numpy(), b=k((300, 16), generator=g).numpy())"
    )
    target = tmp_path / "drawn.npz"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-c", code, str(target)], env=environment, check=True)
    drawn = np.load(target)
    fused = ProjectionSpec(seed=77, rank=16, in_max=500, out_max=300)
    unfused = regenerate(replace(fused, fused=False))
    assert np.array_equal(bits(unfused.a), bits(drawn["a"]))
    assert np.array_equal(bits(unfused.b), bits(drawn["b"]))
    assert (regenerate(fused).a != drawn["a"]).mean() > 0.3


@pytest.mark.parametrize(
    "row", GOLDEN["projections"], ids=lambda row: "-".join(map(str, row["spec"].values()))
)
def test_golden_digests(row: dict[str, Any]) -> None:
    spec = ProjectionSpec.from_dict(row["spec"])
    assert stream_digest(spec) == row["digest"]


@settings(deadline=None)
@given(specs, st.integers(1, 500))
def test_chunks_do_not_change_the_values(spec: ProjectionSpec, chunk: int) -> None:
    whole = regenerate(spec)
    pieces: dict[str, list[Any]] = {"vera_A": [], "vera_B": []}
    for name, start, values in stream(spec, chunk):
        assert start == sum(piece.size for piece in pieces[name])
        assert values.size <= chunk
        pieces[name].append(values)
    assert np.array_equal(np.concatenate(pieces["vera_A"]), whole.a.reshape(-1))
    assert np.array_equal(np.concatenate(pieces["vera_B"]), whole.b.reshape(-1))
    assert stream_digest(spec) == whole.digest


@settings(deadline=None)
@given(specs, st.integers(1, 60))
def test_more_outputs_only_add_rows_of_b(spec: ProjectionSpec, more: int) -> None:
    small, large = regenerate(spec), regenerate(replace(spec, out_max=spec.out_max + more))
    assert np.array_equal(small.a, large.a)
    assert np.array_equal(small.b, large.b[: spec.out_max])


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
def test_only_the_low_32_bits_of_a_seed_count(low: int, high: int) -> None:
    alias = replace(SPEC, seed=(high << 32) + low)
    assert np.array_equal(regenerate(replace(SPEC, seed=low)).b, regenerate(alias).b)


@given(specs)
def test_values_stay_within_the_kaiming_bound(spec: ProjectionSpec) -> None:
    ours = regenerate(spec)
    for array, fan_in in ((ours.a, spec.in_max), (ours.b, spec.rank)):
        assert np.abs(array).max() <= np.sqrt(6 / fan_in) * (1 + 2**-4)


@given(st_numpy.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False)))
def test_rounding_is_torchs_cast(values: Any) -> None:
    for rounding in ROUNDINGS:
        if rounding == "float8_e4m3fn":
            values = np.clip(values, -448, 448)
        cast = torch.from_numpy(values).to(getattr(torch, rounding)).float().numpy()
        assert np.array_equal(bits(round_to(values, rounding)), bits(cast)), rounding


def test_digest_covers_shapes_and_values_in_row_major_order() -> None:
    ours = regenerate(SPEC)
    text = f"vera_A {SPEC.rank} {SPEC.in_max} vera_B {SPEC.out_max} {SPEC.rank}\n".encode()
    assert ours.digest == hashlib.sha256(text + ours.a.tobytes() + ours.b.tobytes()).hexdigest()


@given(specs)
def test_spec_survives_json(spec: ProjectionSpec) -> None:
    assert ProjectionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**64}, "seed 18446744073709551616 isn't an integer that torch takes"),
        ({"seed": "7"}, "seed '7'"),
        ({"rank": 0}, "rank 0 isn't an integer from 1"),
        ({"rank": True}, "rank True"),
        ({"in_max": -5}, "in_max -5"),
        ({"out_max": MAX_SIDE + 1}, "out_max 16777217"),
        ({"rank": 1 << 20, "in_max": 1 << 20}, "at most 1073741824"),
        ({"rounding": "int8"}, "rounding 'int8' isn't one of float32, bfloat16, float16, float8"),
        ({"rounding": ["float32"]}, "rounding"),
        ({"fused": 1}, "fused is 1"),
    ],
)
def test_refuses_a_bad_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ProjectionSpec.from_dict({**SPEC.to_dict(), **change})


@pytest.mark.parametrize("value", [{}, {**SPEC.to_dict(), "extra": 1}, [1], None])
def test_refuses_other_fields(value: Any) -> None:
    with pytest.raises(AdapterError, match="exactly the fields seed, rank"):
        ProjectionSpec.from_dict(value)


def test_refuses_arrays_of_another_shape_or_dtype() -> None:
    ours = regenerate(SPEC)
    with pytest.raises(AdapterError, match=r"vera_A is float32 of shape \[6, 47\] where"):
        Projections(SPEC, ours.a[:, 1:], ours.b)
    with pytest.raises(AdapterError, match="vera_B is float64"):
        Projections(SPEC, ours.a, ours.b.astype(np.float64))


def test_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        regenerate(SPEC).a[0, 0] = 1


def test_delta_is_pefts(tiny_llama: tiny.TinyLlama) -> None:
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=6, projection_prng_key=3, target_modules=["k_proj", "down_proj", "up_proj"])
    model = get_peft_model(tiny.load(tiny_llama.fp32), config)
    tiny.randomize(model, 0.25, 5)
    ours = regenerate(ProjectionSpec(seed=3, rank=6, in_max=160, out_max=160))
    for name in ("self_attn.k_proj", "mlp.down_proj", "mlp.up_proj"):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{name}")
        theirs = layer.get_delta_weight("default").detach().numpy()
        lambda_b, lambda_d = layer.vera_lambda_b["default"].detach(), layer.vera_lambda_d["default"].detach()
        delta = ours.delta(lambda_b.numpy(), lambda_d.numpy(), layer.in_features)
        assert delta.dtype == np.float32
        np.testing.assert_allclose(delta, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_delta_refuses_what_does_not_fit() -> None:
    ours = regenerate(SPEC)
    ones = np.ones(48, np.float32)
    with pytest.raises(MismatchError, match="don't fit projections of rank 6"):
        ours.delta(ones[:32], ones[:5], 48)
    with pytest.raises(MismatchError, match="49 inputs and 32 outputs doesn't fit"):
        ours.delta(ones[:32], ones[:6], 49)
    with pytest.raises(MismatchError, match="48 inputs and 33 outputs doesn't fit"):
        ours.delta(ones[:33], ones[:6], 48)


@pytest.mark.parametrize("drawn", [False, True])
def test_write_is_read_by_safetensors(tmp_path: Path, drawn: bool) -> None:
    ours = regenerate(replace(SPEC, rounding="bfloat16"))
    target = tmp_path / "made" / "projections.safetensors"
    assert write(ours if drawn else ours.spec, target) == ours.digest
    found = load_file(target)
    assert np.array_equal(found["vera_A"], ours.a)
    assert np.array_equal(found["vera_B"], ours.b)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_write_reports_a_refusing_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't write"):
        write(SPEC, tmp_path / "file" / "projections.safetensors")


def test_memory_stays_bounded_whatever_the_size() -> None:
    spec = ProjectionSpec(seed=1, rank=1024, in_max=8192, out_max=8192)  # 64 MiB of float32
    tracemalloc.start()
    try:
        stream_digest(spec)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
