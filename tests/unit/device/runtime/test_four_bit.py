"""4-bit weights as int8 blocks in memory, against ONNX Runtime's MatMulBnb4 and the stored values."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests import exported, tiny, tiny_encoder
from vera_edge import formats
from vera_edge import merging as merge
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime import four_bit, four_bit_graph
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import BundleError, PlanError
from vera_edge.exporting import target
from vera_edge.formats import Bnb4Weight
from vera_edge.rounding.weight_rounding import Rounding, merge_to_folder

IDS = exported.tokens()
OPTIONS = {"double_quant": False, "storage": "U8", "dtype": "float32"}


@pytest.fixture(scope="module")
def branch(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four-bit") / "out"
    target.export(tiny_llama.nf4, [(tiny_adapter, 1.0)], out, mode="branch", weights="nf4")
    return out


@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("nf4", 32), ("fp4", 128)])
def test_every_block_takes_the_best_of_the_scales(quant_type: str, blocksize: int) -> None:
    values = np.random.default_rng(3).standard_normal((24, 96)).astype(np.float32)
    values[0, :64] = 0
    stored = formats.get(quant_type).quantize(values, OPTIONS | {"blocksize": blocksize})
    assert isinstance(stored, Bnb4Weight)
    codes, scales = four_bit.expand(stored.packed, stored.absmax, quant_type, stored.shape, blocksize)
    found = (codes.astype(np.float64) - 128) * scales[..., None]
    exact = stored.rows(0, 24).reshape(found.shape).astype(np.float64)
    least = np.full(scales.shape, np.inf)
    absmax = np.repeat(stored.absmax, blocksize // four_bit.BLOCK).reshape(scales.shape)
    for step in four_bit._STEPS[quant_type]:
        steps = np.rint(exact * step / np.where(absmax == 0, 1, absmax)[..., None])
        error = np.where(abs(steps) > 127, np.inf, steps * (absmax / step)[..., None] - exact)
        least = np.minimum(least, (error**2).sum(axis=2))
    np.testing.assert_allclose(((found - exact) ** 2).sum(axis=2), least, rtol=0.03, atol=1e-7)
    assert not found.reshape(24, 96)[0, :64].any()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_scale_that_a_code_does_not_fit_is_worse_than_any_that_fits(quant_type: str) -> None:
    """In a whole block too, so that it's never taken; and the worst block leaves three bits."""
    errors = four_bit._tables(quant_type).errors.view(np.uint16).astype(int)
    most, parts = errors[errors < four_bit._WORST].max(), four_bit.BLOCK // 4
    assert most * parts < four_bit._WORST and errors.max() * parts << 3 < 1 << 16


def test_several_threads_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "_CHUNK", 64)
    values = np.random.default_rng(4).standard_normal((48, 256)).astype(np.float32)
    stored = formats.get("nf4").quantize(values, OPTIONS | {"blocksize": 64})
    assert isinstance(stored, Bnb4Weight)
    given = (stored.packed, stored.absmax, "nf4", stored.shape, 64)
    with ThreadPoolExecutor(3) as pool:
        for one, other in zip(four_bit.expand(*given), four_bit.expand(*given, pool.map), strict=True):
            np.testing.assert_array_equal(one, other)


def test_expanded_logits_are_those_of_the_weights_as_they_are(branch: Path, tiny_adapter: Path) -> None:
    truth = exported.logits(branch, IDS, branch / "adapters" / "default.onnx_adapter")
    found = {}
    for how in ("expanded", "int8", "kept"):
        session = Session.open(branch, threads=1, four_bit=how)
        assert (session.graph.rewritten is None) == (how == "kept")
        found[how] = session.logits(IDS)
    np.testing.assert_array_equal(found["kept"], Session.open(branch, threads=1, four_bit="kept").logits(IDS))
    np.testing.assert_allclose(found["kept"], truth, atol=1e-5)
    wrong = {how: float(np.square(found[how] - truth).mean()) for how in found}
    assert wrong["expanded"] < wrong["int8"] / 2 and wrong["int8"] > 0


def test_an_encoder_with_rows_of_padding(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    merge_to_folder(merge.prepare(base, [(adapter, 1.0)], "nf4"), tmp_path / "nf4", Rounding("rtn"))
    tiny_encoder.save_tokenizer(tmp_path / "nf4")
    out = tmp_path / "out"
    target.export(tmp_path / "nf4", [(adapter, 1.0)], out, mode="branch", weights="nf4")
    kept = Encoder.open(out, four_bit="kept").embed(tiny_encoder.TEXTS)
    encoder = Encoder.open(out)
    assert encoder.graph.rewritten is not None and encoder.graph.rewritten.products
    found = [Encoder.open(out, four_bit=how).embed(tiny_encoder.TEXTS) for how in ("expanded", "int8")]
    expanded, rounded = (float(np.square(one - kept).mean()) for one in found)
    assert 0 < expanded < rounded / 2


def test_what_it_cannot_expand_stays_as_it_is() -> None:
    for shape, blocksize in (((8, 48), 64), ((3, 32), 64), ((8, 64), 16), ((8, 64), 0)):
        assert not four_bit.can_expand(shape, blocksize)


def test_an_unknown_way_is_refused(branch: Path) -> None:
    with pytest.raises(PlanError, match="can't run as 'int2'; choose from expanded, int8, kept"):
        Session.open(branch, four_bit="int2")  # type: ignore[arg-type]


def test_too_little_memory_is_said_before_it_expands(branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = bundle.read(branch).files
    needed = sum(entry.size for name, entry in entries.items() if name.startswith("onnx/"))
    monkeypatch.setattr("vera_edge.device.runtime.opened.free_memory", lambda: needed + 1000)
    with pytest.raises(BundleError, match=r"as int8 blocks, .* MB in all, .* --four-bit kept"):
        Session.open(branch)
    assert Session.open(branch, four_bit="kept").graph.rewritten is None


def test_a_weight_of_another_size_is_refused(branch: Path, tmp_path: Path) -> None:
    shutil.copytree(branch / "onnx", tmp_path / "onnx")
    model = tmp_path / "onnx" / "model.onnx"
    found = four_bit_graph.products(model)
    grown = [
        four_bit_graph.FourBitProduct(one.name, one.x, one.packed, one.absmax, one.y, (640, 64), 64, "nf4")
        for one in found
    ]
    with pytest.raises(BundleError, match=r"holds no sound .*; copy the bundle again"):
        four_bit_graph.rewrite(model, grown, "expanded")
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    with pytest.raises(BundleError, match="isn't an ONNX graph"):
        four_bit_graph.products(model)
