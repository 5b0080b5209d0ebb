"""A base's own integers in a graph: ONNX Runtime multiplies with what the format means, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tests import exported, tiny
from tests.unit.exporters.test_linear import graph, run
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.formats.affine import HoldsIntegers
from vera_edge.reference.model import load_dense
from vera_edge_onnx.weights import integers
from vera_edge_onnx.weights.linear import StoredProduct

GOLDEN = Path(__file__).parents[2] / "golden" / "formats"
CASES = sorted(
    str(path.parent.relative_to(GOLDEN))
    for name in ("awq", "gptq", "compressed_tensors")
    for path in (GOLDEN / name).glob("*/model.safetensors")
    if "b3-" not in path.parent.name and "fp8" not in path.parent.name
)
Make = Callable[[str, dict[str, Any]], Path]


def own(checkpoint: Checkpoint, module: str) -> StoredProduct:
    weight = checkpoint.load(module)
    assert isinstance(weight, HoldsIntegers)
    return integers.join([integers.of_checkpoint(weight.integers(), module)])


def multiplied_out(linear: StoredProduct, width: int, out: int, folder: Path) -> np.ndarray[Any, Any]:
    """The weight (out, in) as ONNX Runtime sees it: an identity times it, in float32, is exact."""
    weaver, value, end = graph(width, out=out)
    product = linear.product(weaver, value, "w", "/w", end)
    for node in weaver.model.graph:
        if node.op_type == "MatMulNBits":
            del node.attributes["accuracy_level"]
    return run(weaver, product, end, folder, np.eye(width, dtype=np.float32)).T


@pytest.mark.parametrize("case", CASES)
def test_a_librarys_integers_multiply_as_the_library_dequantizes(case: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(GOLDEN / case)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    count = 0
    for module, linear in checkpoint.linears.items():
        if isinstance(checkpoint.load(module), HoldsIntegers):
            found = multiplied_out(own(checkpoint, module), linear.in_features, linear.out_features, tmp_path)
            np.testing.assert_array_equal(found, expected[module].astype(np.float32))
            count += 1
    assert count


@pytest.fixture(scope="module")
def adapter(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_adapter(tiny_llama.fp32, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def make(tiny_llama: tiny.TinyLlama, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The tiny Llama in GPTQ or AWQ, each made once."""
    done: dict[str, Path] = {}

    def quantized(name: str, options: dict[str, Any]) -> Path:
        key = f"{name}{options}"
        if key not in done:
            done[key] = tmp_path_factory.mktemp(name) / "base"
            merge.to_folder(tiny_llama.fp32, [(adapter, 0.0)], done[key], name, options)
        return done[key]

    return quantized


def export(base: Path, adapter: Path, out: Path, mode: str = "branch", **options: str) -> Path:
    target.export(base, [(adapter, 1.0)], out, mode=mode, weights="same", options=options)
    return out


def peft_logits(base: Path, adapter: Path, ids: exported.Int64) -> exported.Float32:
    """PEFT's own layers beside the base's own values."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_dense(Checkpoint.open(base)), adapter).eval()
    with torch.no_grad():
        found: exported.Float32 = model(torch.from_numpy(ids[None])).logits[0].numpy()
    return found


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("gptq", {"group_size": 32}, 4),
        ("gptq", {"group_size": -1, "sym": False}, 4),
        ("gptq", {"group_size": 32, "bits": 2, "sym": False}, 2),
        ("gptq8", {"group_size": 32}, 8),
        ("awq", {"group_size": 32}, 4),
    ],
)
def test_a_branch_beside_an_untouched_base(
    name: str, options: dict[str, Any], bits: int, make: Make, adapter: Path, tmp_path: Path
) -> None:
    base, ids = make(name, options), exported.tokens()
    out = export(base, adapter, tmp_path / "out", head="fp32", projections="fp32", accuracy_level="0")
    truth = peft_logits(base, adapter, ids)
    found = exported.logits(out, ids, out / "adapters" / "default.onnx_adapter")
    assert exported.error(found, truth) < 1e-5
    assert exported.error(exported.logits(out, ids), truth) > 0.1  # without the adapter it's the base
    assert bundle.read(out).weights == f"int{bits}"
    stored = exported.ranges(out)
    assert len([each for each in stored if each.endswith(f".weight.int{bits}")]) == 2 * 5
    symmetric = options.get("sym", name != "awq")
    assert any(each.endswith(".zero_points") for each in stored) is not symmetric
    assert sum(at[1] for each, at in stored.items() if each.endswith(f".weight.int{bits}")) == (
        2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 160) * bits // 8
    )


def disordered(base: Path, out: Path, draw: Callable[[str, int], np.ndarray[Any, Any]]) -> Path:
    """`base` with another g_idx: `draw(module, groups)` gives the group of each input."""
    out.mkdir()
    for path in base.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            tensors[name] = draw(name.removesuffix(".g_idx"), int(tensor.max()) + 1).astype(np.int32)
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("shared", [True, False])
def test_act_order_is_kept(shared: bool, make: Make, adapter: Path, tmp_path: Path) -> None:
    """With one order for all that read the same input, q, k, v stay one product; else each has its own."""

    def draw(module: str, groups: int) -> np.ndarray[Any, Any]:
        seed = groups if shared else sum(map(ord, module))
        return np.random.default_rng(seed).permutation(np.repeat(np.arange(groups), 32))

    base = disordered(make("gptq", {"group_size": 32, "sym": False}), tmp_path / "base", draw)
    ids = exported.tokens()
    out = export(base, adapter, tmp_path / "out", head="fp32", projections="fp32", accuracy_level="0")
    found = exported.logits(out, ids, out / "adapters" / "default.onnx_adapter")
    assert exported.error(found, peft_logits(base, adapter, ids)) < 1e-5
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * (5 if shared else 7)
    orders = {value.name for value in model.graph.initializer if value.name.startswith("order.")}
    assert len(orders) == (2 if shared else 2 * 7)


def test_merged_into_the_bases_own_grid(make: Make, adapter: Path, tmp_path: Path) -> None:
    base, ids = make("gptq8", {"group_size": 32}), exported.tokens()
    out = export(base, adapter, tmp_path / "out", "merged")
    truth = peft_logits(base, adapter, ids)
    assert exported.divergence(truth, exported.logits(out, ids)) < 0.02
    operators = [node.op_type for node in onnx.load(out / "onnx" / "model.onnx").graph.node]
    assert operators.count("MatMulNBits") == 2 * 4 + 1  # qkv, o, gate and up, down; the head


def test_what_cannot_stay_as_it_is(make: Make, adapter: Path, tmp_path: Path) -> None:
    three = make("gptq", {"group_size": 32, "bits": 3})
    uneven = disordered(
        make("gptq", {"group_size": 32}), tmp_path / "uneven", lambda _, groups: np.arange(32 * groups) // 33
    )
    for base, match in ((three, "3 bits in groups of 32"), (uneven, "differ in size")):
        with pytest.raises(TargetError, match=match) as caught:
            export(base, adapter, tmp_path / "out")
        assert "--weights int4 or int8" in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match="a CPU has no accuracy level '2'"):
        export(make("gptq", {"group_size": 32}), adapter, tmp_path / "out", accuracy_level="2")
    with pytest.raises(PlanError, match="only weights that are quantized"):
        export(make("gptq", {"group_size": 32}), adapter, tmp_path / "out", block="64")
