"""Tiny bundles for the tests of the device part: a graph by ONNX Runtime GenAI's builder, a manifest by ours.

The branch is woven here by hand, on down_proj alone and as plainly as it can be, so that the device part is
tested against a graph that no exporter of ours made.
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests import tiny
from vera_edge.bundle import contents as bundle

RANK = 8
LAYERS = 2
HIDDEN, INTERMEDIATE = 64, 160
DIGEST = "0" * 64
Vectors = dict[str, npt.NDArray[np.float32]]


def build(base: Path, folder: Path, precision: str = "fp32") -> Path:
    """The builder's decoder graph of `base` in `folder`, laid out as a bundle, without a manifest."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    cache = str(folder / "cache")
    options = parse_extra_options(None, str(base), str(folder), precision, "cpu", cache, [])
    create_model(None, str(base), str(folder), precision, "cpu", cache, **options)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    import onnx

    model = onnx.load(folder / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).unlink()
    (folder / "onnx").mkdir()
    save(model, folder)
    config = folder / "genai_config.json"
    config.write_text(config.read_text().replace('"model.onnx"', '"onnx/model.onnx"'))
    return folder


def save(model: Any, folder: Path) -> None:
    """Write a graph as onnx/model.onnx with its weights beside it."""
    import onnx

    (folder / "onnx" / "model.onnx_data").unlink(missing_ok=True)
    onnx.save(
        model,
        folder / "onnx" / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )


def merged(base: Path, folder: Path, precision: str = "fp32") -> Path:
    """A bundle of `base` alone, as a merged export is."""
    build(base, folder, precision)
    facts = bundle.ManifestFields(kind="decoder", mode="merged", weights=precision, base={"digest": DIGEST})
    bundle.write(folder, facts)
    return folder


def projections() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A (rank, intermediate) and B (hidden, rank) of the hand-woven branch."""
    draw = np.random.default_rng(3)
    a = draw.standard_normal((RANK, INTERMEDIATE), np.float32) / np.float32(INTERMEDIATE**0.5)
    return a, draw.standard_normal((HIDDEN, RANK), np.float32)


def vectors(seed: int) -> Vectors:
    """Adapter vectors by graph input name, large enough to change what the tiny model says."""
    draw = np.random.default_rng(seed)
    found: Vectors = {}
    for layer in range(LAYERS):
        module = f"model.layers.{layer}.mlp.down_proj"
        found[f"{module}.lambda_b"] = draw.standard_normal(HIDDEN, np.float32) * np.float32(0.5)
        found[f"{module}.lambda_d"] = 1 + draw.standard_normal(RANK, np.float32) * np.float32(0.3)
    return found


def delta(found: Vectors, layer: int) -> npt.NDArray[np.float32]:
    """What the branch adds to down_proj's weight (hidden, intermediate)."""
    a, b = projections()
    module = f"model.layers.{layer}.mlp.down_proj"
    return (found[f"{module}.lambda_b"][:, None] * b) @ (found[f"{module}.lambda_d"][:, None] * a)


def branch(base: Path, folder: Path, batched: bool = False) -> Path:
    """A bundle with a branch on every down_proj and two adapters, "first" (the default) and "second"."""
    import onnx

    build(base, folder)
    model = onnx.load(folder / "onnx" / "model.onnx")
    for layer in range(LAYERS):
        _weave(model.graph, layer, batched)
    a, b = projections()
    for name, value in (("vera_a", a.T), ("vera_b", b.T)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
    save(model, folder)
    (folder / "adapters").mkdir()
    entries = {}
    for name, seed in (("first", 1), ("second", 2)):
        write_adapter(folder / "adapters" / f"{name}.onnx_adapter", vectors(seed))
        entries[name] = {"file": f"adapters/{name}.onnx_adapter", "digest": DIGEST}
    facts = bundle.ManifestFields(
        kind="decoder",
        mode="branch",
        weights="fp32",
        base={"digest": DIGEST},
        adapters=entries,
        default_adapter="first",
        projection={
            "digest": DIGEST,
            "seed": 0,
            "rank": RANK,
            "in_max": INTERMEDIATE,
            "out_max": HIDDEN,
            "rounding": "float32",
            "fused": True,
        },
        exact=True,
        requires={"onnxruntime": "1.22"},
    )
    bundle.write(folder, facts)
    return folder


def _weave(graph: Any, layer: int, batched: bool) -> None:
    """down_proj's output + b * (B (d * (A x))); the vectors are inputs with zeros for a default."""
    from onnx import TensorProto, helper, numpy_helper

    node = next(
        node
        for node in graph.node
        if node.op_type == "MatMul" and f"layers.{layer}/mlp/down_proj" in node.name
    )
    module = f"model.layers.{layer}.mlp.down_proj"
    source, out = node.input[0], node.output[0]
    node.output[0] = f"{module}/base"
    names = {}
    for part, size in (("lambda_b", HIDDEN), ("lambda_d", RANK)):
        name = f"{module}.{part}"
        shape: list[Any] = ["adapter_rows", 1, size] if batched else [size]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        zeros = np.zeros([1, 1, size] if batched else [size], np.float32)
        graph.initializer.append(numpy_helper.from_array(zeros, name))
        names[part] = name
    chain = [
        helper.make_node("MatMul", [source, "vera_a"], [f"{module}/ax"]),
        helper.make_node("Mul", [f"{module}/ax", names["lambda_d"]], [f"{module}/dax"]),
        helper.make_node("MatMul", [f"{module}/dax", "vera_b"], [f"{module}/bdax"]),
        helper.make_node("Mul", [f"{module}/bdax", names["lambda_b"]], [f"{module}/branch"]),
        helper.make_node("Add", [f"{module}/base", f"{module}/branch"], [out]),
    ]
    at = list(graph.node).index(node) + 1
    for offset, new in enumerate(chain):
        graph.node.insert(at + offset, new)


def write_adapter(path: Path, found: Vectors, model_version: int = 1) -> Path:
    """An .onnx_adapter by ONNX Runtime's own writer."""
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(model_version)
    adapter.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in sorted(found.items())}
    )
    adapter.export_adapter(str(path))
    return path


class TorchRunner:
    """A torch model as a reference."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    def logits(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Teacher-forced logits (n, vocab) of one sequence."""
        import torch

        with torch.no_grad():
            found: npt.NDArray[np.float32] = self.model(torch.tensor(tokens)[None]).logits[0].numpy()
        return found


def with_delta(base: Path, found: Vectors) -> Any:
    """The torch model of `base` with the branch's delta added to its weights."""
    import torch

    model = tiny.load(base).eval()
    with torch.no_grad():
        for layer in range(LAYERS):
            model.model.layers[layer].mlp.down_proj.weight += torch.tensor(delta(found, layer))
    return model


def rewrite(folder: Path, **changes: Any) -> None:
    """Write the manifest of a changed folder anew, as its maker would."""
    facts = {key.name: getattr(bundle.read(folder), key.name) for key in fields(bundle.ManifestFields)}
    bundle.write(folder, bundle.ManifestFields(**facts | changes))


def with_golden(bundles: TinyBundles, source: Path, folder: Path, limits: dict[str, float]) -> Path:
    """A copy of a bundle with golden vectors by torch, for the base and every adapter it can swap to."""
    from vera_edge.device.check import golden
    from vera_edge.device.runtime.chat import BundleText

    shutil.copytree(source, folder)
    references: dict[str | None, golden.GivesLogits] = {None: TorchRunner(tiny.load(bundles.base))}
    for name, seed in (("first", 1), ("second", 2)) if bundle.read(folder).adapters else ():
        references[name] = TorchRunner(with_delta(bundles.base, vectors(seed)))
    prompts = ("The adapter", "Merge the two in float32")
    made = golden.make(references, BundleText(folder), "torch", prompts, frozenset({2}), new_tokens=8, k=64)
    (folder / golden.FILE).write_bytes(golden.to_bytes(made))
    rewrite(folder, golden=golden.FILE, limits=limits)
    return folder


class TinyBundles:
    """Bundles of one tiny base, each made when first asked for; read-only, so copy before changing one."""

    def __init__(self, base: Path, root: Path) -> None:
        self.base, self.root = base, root

    @cached_property
    def fp32(self) -> Path:
        """Merged, float32."""
        return merged(self.base, self.root / "fp32")

    @cached_property
    def int4(self) -> Path:
        """Merged, int4."""
        return merged(self.base, self.root / "int4", "int4")

    @cached_property
    def branch(self) -> Path:
        """Float32 with a branch on every down_proj, adapters "first" (the default) and "second"."""
        return branch(self.base, self.root / "branch")

    @cached_property
    def rows(self) -> Path:
        """The same with a batch axis on the vectors."""
        return branch(self.base, self.root / "rows", batched=True)
