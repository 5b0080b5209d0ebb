"""The reference against PEFT, transformers and bitsandbytes themselves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from tests import tiny
from vera_edge.adapters import reading as adapters
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, MismatchError
from vera_edge.reference.model import TorchReference, open_reference
from vera_edge.trained import provenance

TOKENS = np.arange(3, 90, dtype=np.int64) * 4 % tiny.VOCABULARY


def _open(base: Path, folder: Path, weight: float = 1.0) -> TorchReference:
    checkpoint, adapter = Checkpoint.open(base), adapters.read(folder)
    projections = provenance.resolve(adapter, checkpoint).projections
    return open_reference(checkpoint, [(adapter, weight)], projections)


def _logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        found: npt.NDArray[np.float32] = (
            model(input_ids=torch.from_numpy(TOKENS[None])).logits[0].float().numpy()
        )
    return found


def _dequantized_by_bitsandbytes(base: Path, fp32: Path) -> Any:
    """The fp32 architecture holding the quantized folder's weights as bitsandbytes dequantizes them."""
    quantized, model = tiny.load(base), tiny.load(fp32)
    for name, module in quantized.named_modules():
        if hasattr(module, "weight") and getattr(module.weight, "quant_state", None) is not None:
            # Blocks run on over the ends of rows. bitsandbytes 0.50's CPU kernel gets that wrong for rows
            # that aren't whole blocks (down_proj here), so it is asked for one block per row.
            state = module.weight.quant_state
            shape = state.shape
            state.shape = torch.Size((math.prod(shape) // state.blocksize, state.blocksize))
            dense = dequantize_4bit(module.weight.data, state).float()
            model.get_submodule(name).weight.data = dense.reshape(shape)
    return model


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_a_4bit_base_with_its_adapter_is_pefts_forward_on_bitsandbytes_values(
    tiny_llama: tiny.TinyLlama, tmp_path: Path, form: str
) -> None:
    base = getattr(tiny_llama, form)
    folder = tiny.make_adapter(base, tmp_path / "adapter")
    dense = _dequantized_by_bitsandbytes(base, tiny_llama.fp32)
    truth_off = _logits(dense)
    truth_on = _logits(peft.PeftModel.from_pretrained(dense, folder).eval())
    reference = _open(base, folder)
    assert reference.vocab_size == tiny.VOCABULARY
    np.testing.assert_allclose(reference.logits(TOKENS), truth_on, atol=2e-5)
    np.testing.assert_allclose(reference.adapter_off().logits(TOKENS), truth_off, atol=2e-5)
    # Both views come and go without disturbing each other, and the adapter does something.
    np.testing.assert_allclose(reference.logits(TOKENS), truth_on, atol=2e-5)
    assert np.abs(truth_on - truth_off).max() > 0.5


def test_an_int8_base_is_dequantized_as_bitsandbytes_does(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    folder = tiny.make_adapter(tiny_llama.int8, tmp_path / "adapter")
    quantized, dense = tiny.load(tiny_llama.int8), tiny.load(tiny_llama.fp32)
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            codes, scale = module.weight.data.float(), module.weight.SCB.float()
            dense.get_submodule(name).weight.data = codes * (scale[:, None] / 127.0)
    truth = _logits(peft.PeftModel.from_pretrained(dense, folder).eval())
    np.testing.assert_allclose(_open(tiny_llama.int8, folder).logits(TOKENS), truth, atol=2e-4)


def test_a_dense_base_without_an_adapter_is_transformers_itself(tiny_llama: tiny.TinyLlama) -> None:
    reference = open_reference(Checkpoint.open(tiny_llama.sharded))
    np.testing.assert_allclose(reference.logits(TOKENS), _logits(tiny.load(tiny_llama.fp32)), atol=1e-6)
    np.testing.assert_array_equal(reference.adapter_off().logits(TOKENS), reference.logits(TOKENS))


def test_conv1d_layers(tiny_gpt2: Path, tiny_gpt2_adapter: Path) -> None:
    truth = _logits(peft.PeftModel.from_pretrained(tiny.load(tiny_gpt2), tiny_gpt2_adapter).eval())
    np.testing.assert_allclose(_open(tiny_gpt2, tiny_gpt2_adapter).logits(TOKENS), truth, atol=2e-5)


def test_the_projections_are_those_of_training_not_those_of_loading(
    tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """Trained on a base that computes in bf16, PEFT held rounded projections; a float32 load draws others."""
    options = tiny.four_bit("nf4", compute="bfloat16")
    base = tiny.quantize(tiny_llama.fp32, tmp_path / "base", **options)
    trained = peft.get_peft_model(
        tiny.load(base), peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], projection_prng_key=3)
    )
    tiny.randomize(trained, 0.25, 1)
    trained.save_pretrained(tmp_path / "adapter")
    held = trained.base_model.vera_A["default"]
    assert torch.equal(held, held.bfloat16().float())
    reference = _open(base, tmp_path / "adapter")
    for layer in reference.model.modules():
        if hasattr(layer, "vera_lambda_b"):
            assert torch.equal(layer.vera_A["adapter0"], held)
            assert torch.equal(layer.vera_B["adapter0"], trained.base_model.vera_B["default"])


def test_a_weight_scales_the_delta_and_two_halves_make_a_whole(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    checkpoint, adapter = Checkpoint.open(tiny_llama.nf4), adapters.read(tiny_adapter)
    projections = provenance.resolve(adapter, checkpoint).projections
    whole = _open(tiny_llama.nf4, tiny_adapter).logits(TOKENS)
    halves = open_reference(checkpoint, [(adapter, 0.5), (adapter, 0.5)], projections)
    np.testing.assert_allclose(halves.logits(TOKENS), whole, atol=2e-5)
    none = open_reference(checkpoint, [(adapter, 0.0)], projections)
    np.testing.assert_allclose(none.logits(TOKENS), halves.adapter_off().logits(TOKENS), atol=2e-5)


def test_modules_saved_whole_replace_the_bases_only_while_the_adapter_is_on(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    model = tiny.load(tiny_gpt2)
    settings = peft.VeraConfig(r=8, target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    trained = peft.get_peft_model(model, settings)
    tiny.randomize(trained, 0.25, 1)
    with torch.no_grad():
        trained.base_model.model.transformer.ln_f.modules_to_save["default"].weight.mul_(1.7)
    trained.save_pretrained(tmp_path / "adapter")
    reference = _open(tiny_gpt2, tmp_path / "adapter")
    np.testing.assert_allclose(reference.logits(TOKENS), _logits(trained.eval()), atol=2e-5)
    base = _logits(tiny.load(tiny_gpt2))
    np.testing.assert_allclose(reference.adapter_off().logits(TOKENS), base, atol=2e-5)


def test_trained_biases_go_with_the_adapter(tiny_gpt2: Path, tmp_path: Path) -> None:
    settings = peft.VeraConfig(r=8, target_modules=["c_attn"], bias="vera_only", fan_in_fan_out=True)
    trained = peft.get_peft_model(tiny.load(tiny_gpt2), settings)
    tiny.randomize(trained, 0.25, 1)
    with torch.no_grad():
        trained.base_model.model.transformer.h[0].attn.c_attn.base_layer.bias.add_(0.5)
    trained.save_pretrained(tmp_path / "adapter")
    reference = _open(tiny_gpt2, tmp_path / "adapter")
    np.testing.assert_allclose(reference.logits(TOKENS), _logits(trained.eval()), atol=2e-5)
    base = _logits(tiny.load(tiny_gpt2))
    np.testing.assert_allclose(reference.adapter_off().logits(TOKENS), base, atol=2e-5)


def test_every_bias_goes_with_the_adapter(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Those of norms and of layers without vectors too, which bias="all" trains."""
    settings = peft.VeraConfig(r=8, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    trained = peft.get_peft_model(tiny.load(tiny_gpt2), settings)
    tiny.randomize(trained, 0.25, 1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3)
    trained.save_pretrained(tmp_path / "adapter")
    reference = _open(tiny_gpt2, tmp_path / "adapter")
    np.testing.assert_allclose(reference.logits(TOKENS), _logits(trained.eval()), atol=5e-5)
    base = _logits(tiny.load(tiny_gpt2))
    np.testing.assert_allclose(reference.adapter_off().logits(TOKENS), base, atol=2e-5)


def test_a_head_that_is_saved_since_it_is_adapted(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    model = tiny.load(tiny_llama.fp32, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0.5)
    base = tiny.save(model, tmp_path / "untied")
    folder = tiny.make_adapter(base, tmp_path / "adapter", targets=("q_proj", "lm_head"))
    assert "lm_head.weight" in adapters.read(folder).modules_to_save
    trained = peft.PeftModel.from_pretrained(tiny.load(base), folder)
    reference = _open(base, folder)
    np.testing.assert_allclose(reference.logits(TOKENS), _logits(trained.eval()), atol=2e-5)
    np.testing.assert_allclose(reference.adapter_off().logits(TOKENS), _logits(tiny.load(base)), atol=2e-5)


def test_bfloat16_compute_differs_a_little(tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> None:
    reference = _open(tiny_llama.nf4, tiny_adapter)
    full, rounded = reference.logits(TOKENS), reference.bfloat16().logits(TOKENS)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(full - rounded).max() < 0.1 * np.abs(full).max()
    # The noise floor is what torch's own mixed precision gives.
    with torch.autocast("cpu", torch.bfloat16):
        truth = _logits(tiny.load(tiny_llama.fp32))
    plain = open_reference(Checkpoint.open(tiny_llama.fp32)).bfloat16().logits(TOKENS)
    np.testing.assert_array_equal(plain, truth)


def test_an_unknown_architecture_is_refused(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "brand_new"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no model type 'brand_new'"):
        open_reference(Checkpoint.open(folder))


def test_a_base_that_lacks_a_tensor_is_refused(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama.fp32, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.2"):
        open_reference(Checkpoint.open(folder))


def test_an_adapter_of_another_size_is_refused(
    tiny_llama: tiny.TinyLlama, tiny_gpt2: Path, tiny_adapter: Path
) -> None:
    adapter = adapters.read(tiny_adapter)
    projections = provenance.resolve(adapter, Checkpoint.open(tiny_llama.nf4)).projections
    with pytest.raises(MismatchError):
        open_reference(Checkpoint.open(tiny_gpt2), [(adapter, 1.0)], projections)


def test_greedy_continues_with_its_own_likeliest_tokens(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    folder = tiny.make_adapter(tiny_llama.nf4, tmp_path / "adapter")
    trained = _open(tiny_llama.nf4, folder)
    continuations = []
    for view in (trained, trained.adapter_off()):
        found = view.greedy(TOKENS[:20], 12, [])
        tokens = np.append(TOKENS[:20], found)
        assert found == view.logits(tokens)[19:-1].argmax(axis=1).tolist()
        continuations.append(found)
    assert continuations[0] != continuations[1]
    end = continuations[0][3]
    first = continuations[0].index(end)
    assert trained.greedy(TOKENS[:20], 12, [end]) == continuations[0][: first + 1]
