"""Drift by layer against numpy on the weights and torch on the whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from vera_edge.adapters.vera import vectors_of
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import DataError, MismatchError
from vera_edge.measuring import layers, opened_candidate, opened_reference
from vera_edge.measuring.opened_candidate import OpenedCandidate
from vera_edge.measuring.opened_reference import OpenedReference
from vera_edge.measuring.result import LayerDrift
from vera_edge.text import windows
from vera_edge.text.windows import Windows

torch.set_num_threads(1)
BROKEN = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def trained(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> OpenedReference:
    return opened_reference.open_trained(tiny_adapter, tiny_llama.nf4)


@pytest.fixture(scope="module")
def cut(tiny_llama: tiny.TinyLlama) -> Windows:
    tokenizer = windows.open_tokenizer(tiny_llama.fp32)
    return windows.make(windows.read_text("built-in"), tokenizer, tiny.VOCABULARY, tokens=256, window=64)


@pytest.fixture(scope="module")
def merged(
    trained: OpenedReference, tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The exactly merged weights in float32, but for one layer that is rounded coarsely."""
    folder = tmp_path_factory.mktemp("merged")
    model = tiny.load(tiny_llama.fp32)
    assert trained.checkpoint is not None and trained.projections is not None
    for module, linear in trained.checkpoint.linears.items():
        pair = vectors_of(trained.adapters[0][0])[module]
        delta = trained.projections.delta(pair.lambda_b, pair.lambda_d, linear.in_features)
        weight = torch.from_numpy(trained.checkpoint.dequantize(module) + delta)
        if module == BROKEN:
            weight = (weight * 8).round() / 8
        model.get_submodule(module).weight.data = weight
    return tiny.save(model, folder)


@pytest.fixture(scope="module")
def candidate(merged: Path) -> OpenedCandidate:
    return opened_candidate.open_candidate(merged)


@pytest.fixture(scope="module")
def found(trained: OpenedReference, candidate: OpenedCandidate, cut: Windows) -> dict[str, LayerDrift]:
    return {layer.module: layer for layer in layers.by_layer(trained, candidate, cut)}


def test_only_the_layer_that_differs_drifts(found: dict[str, LayerDrift]) -> None:
    assert len(found) == 14
    ranked = sorted(found.values(), key=lambda layer: -(layer.kl or 0.0))
    assert ranked[0].module == BROKEN and (ranked[0].kl or 0) > 1e-4
    for layer in ranked[1:]:
        assert layer.weight_error < 1e-7 and (layer.kl or 0.0) < 1e-8
        assert layer.retained == pytest.approx(1.0, abs=1e-5)


def test_its_weight_errors_are_numpys(
    found: dict[str, LayerDrift], trained: OpenedReference, merged: Path
) -> None:
    assert trained.checkpoint is not None and trained.projections is not None
    base = trained.checkpoint.dequantize(BROKEN)
    pair = vectors_of(trained.adapters[0][0])[BROKEN]
    delta = trained.projections.delta(pair.lambda_b, pair.lambda_d, base.shape[1])
    stored = Checkpoint.open(merged).dequantize(BROKEN)
    error = np.linalg.norm(stored - base - delta)
    layer = found[BROKEN]
    assert layer.weight_error == pytest.approx(error / np.linalg.norm(base + delta), rel=1e-5)
    assert layer.delta_error == pytest.approx(error / np.linalg.norm(delta), rel=1e-5)
    assert layer.retained == pytest.approx(((stored - base) * delta).sum() / (delta**2).sum(), rel=1e-4)
    assert layer.bytes == stored.size * 4


def test_its_kl_is_that_of_the_whole_artefact_since_nothing_else_differs(
    found: dict[str, LayerDrift], trained: OpenedReference, candidate: OpenedCandidate, cut: Windows
) -> None:
    kl = []
    for piece in (cut.tokens[0], cut.tokens[2]):
        reference, other = (
            torch.log_softmax(torch.from_numpy(side.runner.logits(piece)[:-1]).double(), 1)
            for side in (trained, candidate)
        )
        kl.append(torch.nn.functional.kl_div(other, reference, reduction="none", log_target=True).sum(1))
    assert found[BROKEN].kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-2)


def test_its_output_snr_is_torchs_on_the_inputs_it_gets(
    found: dict[str, LayerDrift], candidate: OpenedCandidate, trained: OpenedReference, cut: Windows
) -> None:
    """The layer's inputs come from layers that the artefact has exactly, so both models see the same ones."""
    from vera_edge.reference.model import TorchReference

    assert isinstance(candidate.runner, TorchReference)
    seen: list[torch.Tensor] = []
    layer = candidate.runner.model.get_submodule(BROKEN)
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    for piece in (cut.tokens[0], cut.tokens[2]):
        candidate.runner.logits(piece)
    handle.remove()
    assert trained.checkpoint is not None and trained.projections is not None
    pair = vectors_of(trained.adapters[0][0])[BROKEN]
    base = trained.checkpoint.dequantize(BROKEN)
    exact = torch.from_numpy(
        base + trained.projections.delta(pair.lambda_b, pair.lambda_d, base.shape[1])
    ).double()
    x = torch.cat(seen).double()
    signal = ((x @ exact.T) ** 2).sum()
    noise = ((x @ (layer.weight.detach().double() - exact).T) ** 2).sum()
    assert found[BROKEN].output_snr == pytest.approx(float(10 * torch.log10(signal / noise)), abs=0.05)


def test_measuring_leaves_the_reference_as_it_was(
    found: dict[str, LayerDrift], trained: OpenedReference, tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    tokens = np.arange(40, dtype=np.int64)
    fresh = opened_reference.open_trained(tiny_adapter, tiny_llama.nf4)
    np.testing.assert_array_equal(trained.runner.logits(tokens), fresh.runner.logits(tokens))


def test_conv1d_layers_without_an_adapter(tiny_gpt2: Path, cut: Windows, tmp_path: Path) -> None:
    folder = tmp_path / "rounded"
    model = tiny.load(tiny_gpt2)
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight.data = (layer.weight.data * 8).round() / 8
    tiny.save(model, folder)
    found = layers.by_layer(
        opened_reference.open_trained(tiny_gpt2), opened_candidate.open_candidate(folder), cut
    )
    worst = max(found, key=lambda layer: layer.kl or 0.0)
    assert worst.module == "transformer.h.0.mlp.c_fc" and worst.delta_error is None
    assert all((layer.kl or 0.0) < 1e-8 for layer in found if layer is not worst)


def test_another_shape_is_refused(
    trained: OpenedReference, merged: Path, cut: Windows, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((merged / name).read_bytes())
    tensors = load_file(merged / "model.safetensors")
    tensors[f"{BROKEN}.weight"] = tensors[f"{BROKEN}.weight"][:-8].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    other = OpenedCandidate(
        trained.runner, trained.artefact, folder, None, checkpoint=Checkpoint.open(folder)
    )
    with pytest.raises(MismatchError, match="they are different models"):
        layers.by_layer(trained, other, cut)


def test_an_export_has_no_layers_to_read(trained: OpenedReference) -> None:
    export = OpenedCandidate(trained.runner, trained.artefact, Path("out"), None)
    with pytest.raises(DataError, match="leave --by-layer out"):
        layers.check(trained, export)
