"""GPTQ with a group size that doesn't divide the inputs: the last group is short.

So SmolLM2-135M is stored (576 inputs, groups of 128). The truth is the format's rule, in numpy by hand:
`w[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests import exported, tiny
from tests.conftest import Cli
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import CheckpointError, PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.reference.model import load_dense

GROUP = 128
Values = Mapping[str, np.ndarray[Any, Any]]


def packed(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Codes (n, m) packed along the first axis into int32 (n * bits / 32, m), lowest first."""
    share = 32 // bits
    words = np.zeros((codes.shape[0] // share, codes.shape[1]), np.uint32)
    for row, code in enumerate(codes.astype(np.uint32)):
        words[row // share] |= code << np.uint32(bits * (row % share))
    return words.view(np.int32)


def stored(
    weight: np.ndarray[Any, Any], index: np.ndarray[Any, Any], bits: int, version: str = "gptq"
) -> tuple[Values, np.ndarray[Any, Any]]:
    """A weight (out, in) as GPTQ stores it, and its exact values."""
    groups, top = int(index.max()) + 1, 2**bits - 1
    scales = np.empty((groups, len(weight)), np.float16)
    zeros = np.empty((groups, len(weight)), np.int64)
    codes = np.empty(weight.T.shape, np.int64)
    for group in range(groups):
        part = weight[:, index == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scales[group] = np.maximum((high - low) / top, 1e-4)
        zeros[group] = np.clip(np.rint(-low / scales[group]), 1, top)
        levels = np.rint(part.T / scales[group].astype(np.float32)) + zeros[group]
        codes[index == group] = np.clip(levels, 0, top)
    less = 1 if version == "gptq" else 0
    tensors = {
        ".qweight": packed(codes, bits),
        ".qzeros": np.ascontiguousarray(packed((zeros - less).T, bits).T),
        ".scales": scales,
        ".g_idx": index.astype(np.int32),
    }
    exact = scales.astype(np.float32)[index] * (codes - zeros[index]).astype(np.float32)
    return tensors, np.ascontiguousarray(exact.T)


@dataclass(frozen=True)
class Base:
    """A GPTQ base and the same values in floats."""

    folder: Path
    dense: Path
    exact: Values


def make(root: Path, bits: int = 4, act_order: bool = False, keep_index: bool = True, **config: Any) -> Base:
    """192 and 320 inputs: a whole group and a half, and two and a half."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    settings = LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=192, intermediate_size=320, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    dense = tiny.save(LlamaForCausalLM(settings), root / "dense")
    state, draw = load_file(dense / "model.safetensors"), np.random.default_rng(bits)
    tensors, exact = dict(state), {}
    for name, weight in state.items():
        if "_proj" not in name:
            continue
        index = np.arange(weight.shape[1]) // GROUP
        if act_order:
            index = index[draw.permutation(index.size)]
        module = name.removesuffix(".weight")
        parts, exact[module] = stored(weight, index, bits, config.get("checkpoint_format", "gptq"))
        del tensors[name]
        tensors |= {module + end: part for end, part in parts.items() if keep_index or end != ".g_idx"}
    save_file(
        state | {f"{module}.weight": value for module, value in exact.items()}, dense / "model.safetensors"
    )
    folder = tiny.save(LlamaForCausalLM(settings), root / "gptq")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    told = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "desc_act": act_order}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {**told, **config}}))
    return Base(folder, dense, exact)


KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "8 bits": {"bits": 8},
    "2 bits": {"bits": 2},
    "as gptq_v2": {"checkpoint_format": "gptq_v2"},
    "act-order": {"act_order": True},
    "act-order, 8 bits": {"act_order": True, "bits": 8},
    "without g_idx": {"keep_index": False},
    "with rules by module": {"dynamic": {"+:.*q_proj": {"bits": 4}}},
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make(tmp_path_factory.mktemp("gptq"), **KINDS[request.param])


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_adapter(base.dense, tmp_path_factory.mktemp("adapter") / "a", save_projection=True)


def test_the_last_group_is_short(base: Base) -> None:
    checkpoint = Checkpoint.open(base.folder)
    assert len(base.exact) == 7
    for module, values in base.exact.items():
        np.testing.assert_array_equal(checkpoint.dequantize(module), values)
        weight = checkpoint.load(module)
        for start, stop in ((0, 1), (5, 19), (values.shape[0] - 1, values.shape[0])):
            np.testing.assert_array_equal(weight.rows(start, stop), values[start:stop])


def test_it_merges_as_peft_does(base: Base, adapter: Path, tmp_path: Path) -> None:
    ids = exported.tokens(24)
    expected = exported.peft_logits(base.dense, adapter, ids)
    merge.to_folder(base.folder, [(adapter, 1.0)], tmp_path / "fp32", "fp32")
    with torch.no_grad():
        found = tiny.load(tmp_path / "fp32").eval()(torch.from_numpy(ids[None])).logits[0].numpy()
    assert exported.error(found, expected) < 1e-4


def test_it_stays_as_it_is_and_takes_a_delta(base: Base, adapter: Path, tmp_path: Path) -> None:
    """Nothing to add leaves every byte; what is added is rounded to groups of the same sizes."""
    merge.to_folder(base.folder, [(adapter, 0.0)], tmp_path / "nothing")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base.folder, tmp_path / "nothing")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    merge.to_folder(base.folder, [(adapter, 1.0)], tmp_path / "same")
    merge.to_folder(base.folder, [(adapter, 1.0)], tmp_path / "fp32", "fp32")
    written, exact = Checkpoint.open(tmp_path / "same"), Checkpoint.open(tmp_path / "fp32")
    told = json.loads((tmp_path / "same" / "config.json").read_text())["quantization_config"]
    assert told["group_size"] == GROUP
    for module in base.exact:
        stored = load_file(tmp_path / "same" / "model.safetensors")
        inside = exact.dequantize(module).shape[1]
        assert stored[f"{module}.scales"].shape[0] == -(-inside // GROUP)
        scales = stored[f"{module}.scales"].astype(np.float32)[stored[f"{module}.g_idx"]].T
        wide = exact.dequantize(module)
        assert (np.abs(written.dequantize(module) - wide) <= 0.51 * scales + 1e-6).mean() > 0.99


def test_it_is_exported_with_its_own_integers(base: Base, adapter: Path, tmp_path: Path) -> None:
    ids, out = exported.tokens(24), tmp_path / "out"
    options = {"accuracy_level": "0", "projections": "fp32", "head": "fp32"}
    target.export(base.folder, [(adapter, 1.0)], out, mode="branch", weights="same", options=options)
    for active in (True, False):
        vectors = out / "adapters" / "default.onnx_adapter" if active else None
        expected = exported.peft_logits(base.dense, adapter, ids, active)
        assert exported.error(exported.logits(out, ids, vectors), expected) < 1e-5
    operators = [node.op_type for node in onnx.load(out / "onnx" / "model.onnx").graph.node]
    assert operators.count("MatMulNBits") >= 4


def test_merged_into_the_bases_own_grid(adapter: Path, base: Base, tmp_path: Path) -> None:
    ids = exported.tokens(24)
    merge.to_folder(base.folder, [(adapter, 1.0)], tmp_path / "same")
    target.export(base.folder, [(adapter, 1.0)], tmp_path / "out", mode="merged", weights="same")
    rounded = load_dense(Checkpoint.open(tmp_path / "same")).eval()
    with torch.no_grad():
        expected = rounded(torch.from_numpy(ids[None])).logits[0].numpy()
    assert exported.divergence(expected, exported.logits(tmp_path / "out", ids)) < 0.05


def test_it_is_rounded_with_error_compensation_too(tmp_path: Path, cli: Cli) -> None:
    """What the commands do by themselves at 4 bits."""
    base = make(tmp_path)
    adapter = tiny.make_adapter(base.dense, tmp_path / "a", save_projection=True)
    for command in (("merge",), ("export", "--mode", "merged", "--weights", "same")):
        out = tmp_path / command[0]
        done = cli(*command[:1], base.folder, adapter, "-o", out, *command[1:])
        assert done.exit_code == 0, done.stderr
    written = Checkpoint.open(tmp_path / "merge")
    assert {linear.format for module, linear in written.linears.items() if module in base.exact} == {"gptq"}
    merge.to_folder(base.folder, [(adapter, 1.0)], tmp_path / "fp32", "fp32")
    exact = Checkpoint.open(tmp_path / "fp32")
    for module in base.exact:
        error = np.linalg.norm(written.dequantize(module) - exact.dequantize(module))
        assert error < 0.3 * np.linalg.norm(exact.dequantize(module))
    ids = exported.tokens(24)
    expected = exported.peft_logits(base.dense, adapter, ids)
    assert exported.divergence(expected, exported.logits(tmp_path / "export", ids)) < 0.3


def test_a_group_that_the_scales_dont_fit_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path)
    path = base.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has shape \[3, 192\], but 4 bits in groups of 64 asks for"):
        Checkpoint.open(base.folder)


def test_short_groups_arent_chosen_for_a_model_that_has_none(tmp_path: Path) -> None:
    """Few readers take them."""
    base = make(tmp_path)
    adapter = tiny.make_adapter(base.dense, tmp_path / "a")
    with pytest.raises(PlanError, match=r"a group size of 128 doesn't divide its (192|320) inputs"):
        merge.to_folder(base.dense, [(adapter, 1.0)], tmp_path / "m", "gptq")


def test_groups_of_many_sizes_cant_be_sorted_into_blocks(tmp_path: Path) -> None:
    base = make(tmp_path, act_order=True)
    adapter = tiny.make_adapter(base.dense, tmp_path / "a", save_projection=True)
    path = base.folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.g_idx"
    tensors[name] = (np.arange(192) >= 100).astype(np.int32)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TargetError, match=r"groups of .*q_proj \(its g_idx\) differ in size"):
        target.export(base.folder, [(adapter, 1.0)], tmp_path / "out", mode="branch", weights="same")
