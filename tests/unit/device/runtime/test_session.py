"""A session, against transformers in float32 and ONNX Runtime's own adapters."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests import tiny, tiny_bundle
from tests.tiny_bundle import TinyBundles
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.errors import AdapterError, BundleError, DataError, MismatchError

TOKENS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, 90)
PROMPT = "The adapter scales each row"


@pytest.fixture(scope="module")
def reference(tiny_bundles: TinyBundles) -> Any:
    return tiny.load(tiny_bundles.base).eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].numpy()


def torch_greedy(model: Any, tokens: np.ndarray, count: int) -> list[int]:
    import torch

    prompt = torch.tensor(tokens)[None]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    return [int(token) for token in out[0, len(tokens) :]]


def test_logits_are_those_of_torch_whatever_the_chunk(
    tiny_bundles: TinyBundles, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.open(tiny_bundles.fp32)
    expected = torch_logits(reference, TOKENS)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(session.logits(TOKENS), expected, atol=2e-5 * scale)
    monkeypatch.setattr("vera_edge.device.runtime.decoding._MAX_CHUNK", 7)
    assert session.decoder.chunk == 7
    np.testing.assert_allclose(session.logits(TOKENS), expected, atol=2e-5 * scale)


def test_weights_packed_by_several_threads_give_the_same_bits(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch: many products share two weights, which each of them packs."""
    for folder in (tiny_bundles.int4, tiny_bundles.branch):
        expected = Session.open(folder, threads=3).logits(TOKENS)
        with monkeypatch.context() as patched:
            patched.setattr("vera_edge.device.runtime.opened._LARGE", 0)
            for _ in range(5):
                session = Session.open(folder, threads=3)
                options = session.graph.session.get_session_options()
                assert options.get_session_config_entry("session.prepack.enable_parallel") == "1"
                np.testing.assert_array_equal(session.logits(TOKENS), expected)


def test_greedy_text_is_that_of_transformers(tiny_bundles: TinyBundles, reference: Any) -> None:
    session = Session.open(tiny_bundles.fp32)
    generation = session.generate(PROMPT, raw=True, max_tokens=40)
    text = "".join(generation)
    expected = torch_greedy(reference, generation.prompt, 40)
    ended = expected[:-1] if expected[-1] == 2 else expected
    assert generation.tokens == ended
    assert text == session.text.text(ended)
    assert generation.finish == ("end" if expected[-1] == 2 else "length")


def test_int4_steps_continue_what_its_prefill_says(tiny_bundles: TinyBundles) -> None:
    """One token at a time the cache gives what the whole sequence at once gives, up to the int8 kernels."""
    session = Session.open(tiny_bundles.int4)
    whole = session.logits(TOKENS)
    from vera_edge.device.runtime.decoding import Steps

    steps = Steps(session.decoder, session.decoder.cache(len(TOKENS)), {})
    single = np.concatenate([steps.feed(TOKENS[None, i : i + 1])[0].copy() for i in range(len(TOKENS))])
    scale = np.abs(whole).max()
    assert np.abs(single - whole).max() < 0.05 * scale
    fp32 = Session.open(tiny_bundles.fp32).logits(TOKENS)
    assert (
        np.abs(whole - fp32).max() > 1e-3 * scale
    )  # it is another model, so the bound above means something


def test_adapters_add_their_delta_and_none_is_the_base(tiny_bundles: TinyBundles, reference: Any) -> None:
    session = Session.open(tiny_bundles.branch)
    assert session.adapter == "first"
    base = torch_logits(reference, TOKENS)
    scale = np.abs(base).max()
    for name, seed in (("first", 1), ("second", 2)):
        session.swap(name)
        expected = torch_logits(tiny_bundle.with_delta(tiny_bundles.base, tiny_bundle.vectors(seed)), TOKENS)
        assert np.abs(expected - base).max() > 0.1 * scale
        np.testing.assert_allclose(session.logits(TOKENS), expected, atol=5e-5 * scale)
    session.swap(None)
    np.testing.assert_allclose(session.logits(TOKENS), base, atol=2e-5 * scale)


def test_an_adapter_gives_what_onnxruntimes_own_loading_gives(tiny_bundles: TinyBundles) -> None:
    file = tiny_bundles.branch / "adapters" / "second.onnx_adapter"
    session = Session.open(tiny_bundles.branch, file)
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    feeds: dict[str, Any] = {"input_ids": TOKENS[None], "attention_mask": np.ones((1, len(TOKENS)), np.int64)}
    for past, _ in session.decoder.caches:
        feeds[past.name] = np.zeros(
            (1, session.decoder.kv_shape[0], 0, session.decoder.kv_shape[1]), np.float32
        )
    expected = session.graph.session.run(["logits"], feeds, options)[0][0]
    np.testing.assert_array_equal(session.logits(TOKENS), expected)


def test_a_batch_axis_on_the_vectors_changes_nothing_for_one_row(tiny_bundles: TinyBundles) -> None:
    plain, rows = Session.open(tiny_bundles.branch), Session.open(tiny_bundles.rows)
    np.testing.assert_allclose(plain.logits(TOKENS), rows.logits(TOKENS), atol=1e-4)


def test_names_that_mean_nothing_and_merged_bundles_refuse(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    session = Session.open(tiny_bundles.branch)
    with pytest.raises(MismatchError, match="no adapter named 'third', only: first, second"):
        session.swap("third")
    with pytest.raises(AdapterError, match="is missing"):
        session.swap(tmp_path / "x.onnx_adapter")
    assert session.adapter == "first"
    merged = Session.open(tiny_bundles.fp32)
    for wrong in (tiny_bundles.branch / "adapters" / "first.onnx_adapter", "first", None):
        with pytest.raises(MismatchError, match="is merged into"):
            merged.swap(wrong)


def broken_adapters() -> dict[str, tuple[tiny_bundle.Vectors, int, str]]:
    sound = tiny_bundle.vectors(4)
    name = sorted(sound)[0]
    half = {key: value for key, value in sound.items() if key.endswith("lambda_d")}
    return {
        "half of the vectors": (half, 1, "lacks 2 of the graph's 4 vectors"),
        "a stranger": (sound | {"x": sound[name]}, 1, "holds x, which isn't a vector"),
        "another shape": (sound | {name: sound[name][:-1]}, 1, "the graph takes float32"),
        "another dtype": (sound | {name: sound[name].astype(np.float64)}, 1, "the graph takes float32"),
        "not a number": (sound | {name: sound[name] * np.float32("nan")}, 1, "NaN or infinity"),
        "another base": (sound, 2, "made for another base or another projection"),
    }


@pytest.mark.parametrize("what", broken_adapters())
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_bundles: TinyBundles, tmp_path: Path, what: str
) -> None:
    vectors, version, says = broken_adapters()[what]
    path = tiny_bundle.write_adapter(tmp_path / "x.onnx_adapter", vectors, version)
    session = Session.open(tiny_bundles.branch)
    with pytest.raises((AdapterError, MismatchError), match=says):
        session.swap(path)
    assert session.adapter == "first"


def test_a_file_that_is_no_adapter_is_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    session = Session.open(tiny_bundles.branch)
    for content in (b"", b"PK\x03\x04 zip", b"\0\0\0\0TORT", b"\xff" * 4 + b"TORT" + b"\xff" * 64):
        path = tmp_path / "x.onnx_adapter"
        path.write_bytes(content)
        with pytest.raises(AdapterError):
            session.swap(path)


def test_generations_keep_the_adapter_they_began_with(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.branch)
    alone = {}
    for name in ("first", "second", None):
        session.swap(name)
        alone[name] = "".join(session.generate(PROMPT, raw=True, max_tokens=30))
    assert len(set(alone.values())) == 3
    session.swap("first")
    first = session.generate(PROMPT, raw=True, max_tokens=30)
    pieces = [next(first)]
    session.swap("second")
    second = session.generate(PROMPT, raw=True, max_tokens=30)
    for piece in first:
        pieces.append(piece)
        next(second, "")
    assert "".join(pieces) == alone["first"]


def test_threads_share_a_session_and_get_what_each_gets_alone(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.branch)
    prompts = [PROMPT, "Merge the two", "A weight of the base layer", "each column"]

    def answer(index: int) -> str:
        options: dict[str, Any] = {"temperature": 0.8, "seed": index} if index % 2 else {}
        return "".join(session.generate(prompts[index % 4], raw=True, max_tokens=40, **options))

    alone = [answer(index) for index in range(8)]
    together: list[str] = [""] * 8

    def work(index: int) -> None:
        together[index] = answer(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_stop_strings_end_the_text_before_them(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.fp32)
    whole = "".join(session.generate(PROMPT, raw=True, max_tokens=40))
    for start in (3, 8, 15):
        stop = whole[start : start + 4]
        generation = session.generate(PROMPT, raw=True, max_tokens=40, stop=[stop, "never said"])
        pieces = list(generation)
        assert "".join(pieces) == whole[: whole.index(stop)]
        assert all(pieces) and generation.finish == "stop"


def test_the_context_and_max_tokens_bound_the_text(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.fp32)
    context = session.decoder.context
    assert context == 256
    long = np.resize(TOKENS, context - 2)
    generation = session.generate(long, max_tokens=50)
    list(generation)
    assert len(generation.tokens) <= 2
    with pytest.raises(DataError, match="is 256 tokens long and the context holds 256"):
        session.generate(np.resize(TOKENS, context))
    with pytest.raises(DataError, match="outside the vocabulary"):
        session.generate(np.array([tiny.VOCABULARY]))
    none = session.generate(PROMPT, raw=True, max_tokens=0)
    assert list(none) == [] and none.finish == "length" and none.tokens == []


def test_a_seed_repeats_and_no_seed_varies(tiny_bundles: TinyBundles) -> None:
    session = Session.open(tiny_bundles.fp32)

    def text(seed: int | None) -> str:
        return "".join(session.generate(PROMPT, raw=True, max_tokens=20, temperature=1.5, seed=seed))

    assert text(1) == text(1) != text(2)
    assert len({text(None) for _ in range(4)}) > 1


def test_a_thousand_flipped_bits_are_caught_before_the_graph_is_opened(
    tiny_bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bundle.with_golden(tiny_bundles, tiny_bundles.branch, tmp_path / "b", {})
    monkeypatch.setattr("vera_edge.bundle.contents._QUICK", 1000)  # as if most files were big

    def reached(*_: object) -> None:
        pytest.fail("the graph was opened")

    monkeypatch.setattr("vera_edge.device.runtime.opened.Graph", reached)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(paths) >= 9
    draw = random.Random(11)
    for number in range(1000):
        path = paths[number % len(paths)]
        at, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        flip(path, at, bit)
        with pytest.raises(BundleError):
            Session.open(folder)
        flip(path, at, bit)
    monkeypatch.undo()
    assert Session.open(folder).adapter == "first"


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("rb+") as stream:
        stream.seek(at)
        (value,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([value ^ bit]))


def test_damage_newer_runtimes_and_foreign_graphs_are_refused(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "b")
    facts = {key: getattr(bundle.read(folder), key) for key in bundle.ManifestFields.__dataclass_fields__}
    data = folder / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged"):
        Session.open(folder)
    bundle.write(folder, bundle.ManifestFields(**facts | {"requires": {"onnxruntime": "99.1"}}))
    with pytest.raises(BundleError, match=r"needs onnxruntime 99\.1 or newer"):
        Session.open(folder)
    (folder / "onnx" / "model.onnx").write_bytes(b"not a graph")
    bundle.write(folder, bundle.ManifestFields(**facts))
    with pytest.raises(BundleError, match="ONNX Runtime can't open"):
        Session.open(folder)
    (folder / "genai_config.json").write_text('{"model": {}, "search": {}}')
    bundle.write(folder, bundle.ManifestFields(**facts))
    shutil.copy(tiny_bundles.fp32 / "onnx" / "model.onnx", folder / "onnx" / "model.onnx")
    bundle.write(folder, bundle.ManifestFields(**facts))
    with pytest.raises(BundleError, match=r"genai_config\.json lacks or garbles"):
        Session.open(folder)
