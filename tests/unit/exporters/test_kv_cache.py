"""Keys and values as int8: scales against what transformers keeps, and every way that a cache is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import vera_edge
from tests import exported, tiny
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.rows import Rows, bytes_per_token
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.measuring.exactness import unlike_trained
from vera_edge.releasing.variant import Variant
from vera_edge.rounding.weight_rounding import Rounding, calibration_windows
from vera_edge_onnx.decoder import drawing as drawings
from vera_edge_onnx.decoder import kv_cache

TEXT = "Rivers run from hills to the sea, and the sea gives rain back to the hills.\n" * 40
PROMPT = np.array([5, 6, 7, 8] * 5, np.int64)
LAYERS = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def adapter(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_adapter(tiny_llama.fp32, tmp_path_factory.mktemp("kv") / "adapter")


@pytest.fixture(scope="module")
def make(
    tiny_llama: tiny.TinyLlama, adapter: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Exports with an int8 cache, or a float one, each made once."""
    done: dict[tuple[str, ...], Path] = {}

    def export(mode: str, weights: str, kv: str = "int8") -> Path:
        if (mode, weights, kv) not in done:
            out = tmp_path_factory.mktemp("export") / "out"
            target.export(
                tiny_llama.fp32, [(adapter, 1.0)], out, mode=mode, weights=weights,
                options={"kv_cache": kv}, rounding=Rounding("rtn", str(text)),
            )  # fmt: skip
            done[mode, weights, kv] = out
        return done[mode, weights, kv]

    return export


def kept_by_transformers(base: Path, adapter: Path, windows: Sequence[np.ndarray], active: bool) -> Any:
    """The largest key, after its rotation, and value of each layer's channels (layer, part, head, channel),
    as transformers' own cache holds them."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny.load(base), adapter).eval()
    most: Any = 0.0
    for window in windows:
        ids = torch.from_numpy(window[None])
        with torch.no_grad(), nullcontext() if active else model.disable_adapter():
            cache = model(ids, use_cache=True).past_key_values
        kept = [(layer.keys[0].abs().amax(1), layer.values[0].abs().amax(1)) for layer in cache.layers]
        most = np.maximum(most, [[part.numpy() for part in layer] for layer in kept])
    return most


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_scales_reach_what_the_adapted_model_keeps_of_the_text(
    mode: str, make: Callable[..., Path], tiny_llama: tiny.TinyLlama, adapter: Path, text: Path
) -> None:
    model = ir.load(make(mode, "fp32") / "onnx" / "model.onnx")
    cut, _ = calibration_windows(Checkpoint.open(tiny_llama.fp32), str(text), 2048)
    sets = (True,) if mode == "merged" else (True, False)
    ways = [kept_by_transformers(tiny_llama.fp32, adapter, cut.windows, active) for active in sets]
    for layer, most in enumerate(np.maximum.reduce(ways)):
        for part, seen in zip(("key", "value"), most, strict=True):
            scale = model.graph.initializers[f"present.{layer}.{part}.scale"].const_value
            assert scale is not None
            ratio = scale.numpy()[0, :, 0] * 127 / 1.25 / seen
            assert (ratio > 1 - 1e-5).all()
            if part == "value":
                assert (ratio < 1.01).all()
            else:  # two that a rotation mixes have one scale, by which the larger is reached
                halves = np.stack(np.split(scale.numpy()[0, :, 0], 2, axis=-1))
                np.testing.assert_array_equal(*halves)
                assert (np.minimum(*np.split(ratio, 2, axis=-1)) < 1.43).all()


def test_keys_of_two_channels_change_places_further_on() -> None:
    """Turned to any position, a key stays within what was seen of it at others."""
    keys = np.random.default_rng(0).standard_normal((1, 1, 8)).astype(np.float32)
    angles = np.outer(np.arange(4000), [1, 0.1, 0.001])
    cos, sin = np.cos(angles), np.sin(angles)
    for interleaved in (False, True):
        turned = np.repeat(keys.astype(np.float64), len(angles), 1)
        one, other = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
        a, b = keys[..., one], keys[..., other]
        turned[..., one], turned[..., other] = a * cos - b * sin, a * sin + b * cos
        rotation = kv_cache._Rotation(6, interleaved)
        first = rotation.longest(keys)[0, 0]
        np.testing.assert_allclose(first, np.abs(turned).max((0, 1)), rtol=0.02)
        assert (np.abs(keys[0, 0]) < 0.9 * first).any()


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_it_loses_little_and_not_nothing(
    mode: str, make: Callable[..., Path], tiny_llama: tiny.TinyLlama, adapter: Path, text: Path
) -> None:
    cut, _ = calibration_windows(Checkpoint.open(tiny_llama.fp32), str(text), 2048)
    ids = cut.windows[0]
    truth = exported.peft_logits(tiny_llama.fp32, adapter, ids)
    effect = exported.divergence(truth, exported.peft_logits(tiny_llama.fp32, adapter, ids, active=False))
    lost = exported.divergence(truth, Session.open(make(mode, "fp32"), threads=1).logits(ids))
    exact = exported.divergence(truth, Session.open(make(mode, "fp32", "float"), threads=1).logits(ids))
    assert exact < 1e-8 < lost < 0.02 * effect


def test_prompts_in_pieces_token_by_token_and_in_parts(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ids = make("branch", "fp32"), exported.tokens()
    session = Session.open(out, threads=1)
    whole = session.logits(ids)
    exported.assert_same_in_parts(out, ids)
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", 7)
    assert exported.error(session.logits(ids), whole) < 1e-4
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", 1)
    assert exported.error(session.logits(ids), whole) < 1e-4


def test_plain_onnx_runtime_hands_the_cache_on(make: Callable[..., Path]) -> None:
    """As any program would that makes its caches of the graph's type; without a buffer that is shared."""
    out, ids = make("merged", "fp32"), exported.tokens()
    running = exported.session(out)
    pasts = [value for value in running.get_inputs() if value.name.startswith("past")]
    assert {value.type for value in pasts} == {"tensor(int8)"}
    cache = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.int8) for value in pasts}
    presents = [name.replace("past_key_values", "present") for name in cache]
    found = []
    for token in range(len(ids)):
        feeds = {
            "input_ids": ids[None, token : token + 1],
            "attention_mask": np.ones((1, token + 1), np.int64),
        }
        logits, *arrays = running.run(["logits", *presents], feeds | cache)
        cache = dict(zip(cache, arrays, strict=True))
        found.append(logits[0, 0])
    assert exported.error(np.stack(found), Session.open(out, threads=1).logits(ids)) < 1e-4


def test_a_token_takes_a_quarter(make: Callable[..., Path]) -> None:
    sizes = [bytes_per_token(Session.open(make("merged", "fp32", kv)).decoder) for kv in ("int8", "float")]
    assert sizes[0] * 4 == sizes[1]


def test_looking_ahead_and_what_begins_alike(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.open(make("merged", "int8"), threads=1, prompt_cache=1 << 20)
    session.look_ahead(3)  # holds logits and caches of four tokens at once against one by one, to the bit
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", 8)
    first, again = (session.generate(PROMPT, max_tokens=12) for _ in range(2))
    assert "".join(first) == "".join(again)
    assert (first.reused, again.reused) == (0, 16)


def test_genai_gives_the_same_text(make: Callable[..., Path]) -> None:
    import onnxruntime_genai as genai

    out = make("merged", "int8")
    ours = Session.open(out, threads=1).generate(PROMPT, max_tokens=12)
    "".join(ours)
    params = genai.GeneratorParams(model := genai.Model(str(out)))
    params.set_search_options(max_length=len(PROMPT) + len(ours.tokens), do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(PROMPT.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[len(PROMPT) :] == list(ours.tokens)


def test_rows_that_join_one_batch(make: Callable[..., Path]) -> None:
    session = Session.open(make("merged", "fp32"), threads=1)
    decoder, rows, alone = session.decoder, Rows(session.decoder, 40, 2), []
    for tokens in (PROMPT, PROMPT[1:9]):
        steps = Steps(decoder, decoder.cache(40), session.vectors)
        steps.prefill(tokens)
        rows.join(steps.cache, len(tokens), session.vectors)
        alone.append(steps)
    for row, (steps, token, found) in enumerate(zip(alone, (9, 10), rows.feed([9, 10]), strict=True)):
        assert exported.error(found, steps.feed(np.array([[token]]))[0, 0]) < 1e-4, row


def test_it_says_what_it_takes(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = make("branch", "fp32")
    manifest = bundle.read(out)
    assert manifest.requires == {"onnxruntime": "1.27"}
    assert manifest.options["kv_cache"] == "int8"
    assert "keys and values are kept as int8" in (unlike_trained(manifest) or "")
    assert unlike_trained(bundle.read(make("branch", "fp32", "float"))) is None
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(BundleError, match=r"needs onnxruntime 1\.27 or newer, not 1\.26\.0; update it"):
        Session.open(out)


def test_adapters_of_a_branch_have_scales_of_their_own() -> None:
    assert Variant(mode="branch").shares_graph
    assert not Variant(mode="branch", kv_cache="int8").shares_graph


def test_another_attention_is_refused(tiny_llama: tiny.TinyLlama, make: Callable[..., Path]) -> None:
    model = ir.load(make("merged", "fp32", "float") / "onnx" / "model.onnx")
    drawing = drawings.Drawing(model, Checkpoint.open(tiny_llama.fp32), "Llama", None, Path(), ())
    assert len(kv_cache._attention(drawing)) == LAYERS
    next(node for node in model.graph if node.op_type == "GroupQueryAttention").op_type = "MultiHeadAttention"
    with pytest.raises(TargetError, match="not all layers of this Llama are a GroupQueryAttention"):
        kv_cache._attention(replace(drawing, model=model))


def test_what_has_no_cache_or_no_such_one_is_refused(
    tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="can't be kept as 'int4'; choose from float, int8"):
        vera_edge.export(tiny_llama.fp32, adapter, out=tmp_path / "out", kv_cache="int4")
    with pytest.raises(PlanError, match="takes no option 'kv_cache'"):
        vera_edge.export(tiny_llama.fp32, adapter, out=tmp_path / "out", target="gguf", kv_cache="int8")
    assert not list(tmp_path.iterdir())


def test_scales_have_eight_bits_and_reach() -> None:
    most = np.array([[0.0, 127.0, 127.1, 1e-3]], np.float32)
    found = kv_cache._scales(most)
    assert found.dtype == np.float32
    assert found.shape == (1, 1, 1, 4)
    np.testing.assert_array_equal(found[..., :3].ravel(), [1, 1.25, 1.25 + 2**-7])
    assert most[0, 3] / 101.6 <= found[..., 3] <= most[0, 3] / 101.6 * (1 + 2**-7)
    assert not (found.view(np.uint32) & 0xFFFF).any()
