"""Graphs drawn from a skeleton: the layers are where hashing finds them, and nothing else goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests import exported, tiny
from tests.unit.exporters.test_decoder import family_base
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.exporting import target
from vera_edge.merging.computed import ComputedTensors, open_computed
from vera_edge.plans import plan as plans
from vera_edge.reference.loading import config_of
from vera_edge.trained.trained_model import open_model
from vera_edge_onnx.decoder.drawing import draw, sites_of
from vera_edge_onnx.graph import skeleton
from vera_edge_onnx.graph.computed import ComputedWeight
from vera_edge_onnx.graph.skeleton import Computed, Skeleton


def computed_of(base: Path, adapter: Path, folder: Path) -> Checkpoint:
    model = open_model(base, [(adapter, 1.0)])
    return open_computed(plans.plan_model(model, "merged", "fp32"), model, folder)


@pytest.fixture(scope="module")
def bones(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    folder = tmp_path_factory.mktemp("bones")
    adapter = tiny.make_adapter(tiny_llama.fp32, folder / "adapter")
    tensors = computed_of(tiny_llama.fp32, adapter, folder / "computed").tensors
    assert isinstance(tensors, ComputedTensors)
    return Skeleton.of(tensors)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["phi3", "gemma2", "llama with an adapted head", "mistral"])
def test_layers_are_found_where_their_bytes_are(family: str, fuse: bool, tmp_path: Path) -> None:
    """The truth: the graph drawn from the weights themselves, and each of its rows looked up."""
    base, adapter = family_base(family, tmp_path)
    model = open_model(base, [(adapter, 1.0)])
    merge.write(plans.plan_model(model, "merged", "fp32"), model, tmp_path / "written")
    found = []
    sources = (Checkpoint.open(tmp_path / "written"), computed_of(base, adapter, tmp_path / "computed"))
    for source in sources:
        name = config_of(source).architectures[0]
        drawing = draw(source, config_of(source), name, tmp_path / f"{source.path.name}-graph", fuse)
        values = {
            name: value.const_value.numpy()
            for name, value in drawing.model.graph.initializers.items()
            if value.const_value is not None
        }
        places = [(site.name, site.parts, site.in_features) for site in sites_of(drawing)]
        found.append((places, values, drawing.model))
    (places, values, _), (again, computed, graph) = found
    assert places == again and places
    assert values.keys() == computed.keys()
    for name in values:
        np.testing.assert_array_equal(values[name], computed[name])
    lazy = [
        value for value in graph.graph.initializers.values() if isinstance(value.const_value, ComputedWeight)
    ]
    assert len(lazy) >= len(places)


MOVED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "transposed": lambda one, other: one.T,
    "cut": lambda one, other: one[3:17, :],
    "joined": lambda one, other: torch.cat([one, other], dim=0).reshape(-1, one.shape[1]).T,
    "a parameter": lambda one, other: torch.nn.Parameter(one[2:], requires_grad=False).detach().contiguous(),
    "in parts": lambda one, other: torch.cat([one.chunk(2)[1], other[:5]]),
}
COMPUTED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "scaled": lambda one, other: one * 2.0,
    "shifted": lambda one, other: one + 1,
    "columns in another order": lambda one, other: one[:, torch.arange(63, -1, -1)],
    "side by side": lambda one, other: torch.cat([one, one], dim=1),
    "beside floats": lambda one, other: torch.cat([one, torch.zeros(1, 64)]),
    "stacked": lambda one, other: torch.stack([one, one]),
    "copied elsewhere": lambda one, other: torch.empty(one.shape).copy_(one),
    "in another dtype": lambda one, other: one.to(torch.bfloat16),
    "multiplied with": lambda one, other: torch.ones(3, one.shape[0]) @ one,
}


def matrices(bones: Skeleton) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = "model.layers.0.self_attn"
    return bones.tensors[f"{prefix}.q_proj.weight"], bones.tensors[f"{prefix}.k_proj.weight"]


def graph_of(tensor: torch.Tensor) -> ir.Graph:
    value = ir.Value(name="w", const_value=ir.tensor(tensor.numpy(), name="w"))
    return ir.Graph([], [], nodes=[], initializers=[value])


@pytest.mark.parametrize("how", MOVED)
def test_rows_that_are_moved_are_known_and_take_no_memory(how: str, bones: Skeleton) -> None:
    one, other = matrices(bones)
    with skeleton._Watch():
        moved = MOVED[how](one, other)
    assert moved.untyped_storage().nbytes() < moved.numel()  # a quarter of it
    weight = bones.take_out(graph_of(moved))["w"]
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"]
    truth = MOVED[how](*(torch.from_numpy(bones.source.float32(name)) for name in names))
    np.testing.assert_array_equal(weight.numpy(), truth.numpy())


@pytest.mark.parametrize("how", COMPUTED)
def test_what_is_computed_of_weights_ends_the_drawing(how: str, bones: Skeleton) -> None:
    with skeleton._Watch(), pytest.raises(Computed):
        COMPUTED[how](*matrices(bones))


def test_numbers_of_rows_never_go_into_a_graph(bones: Skeleton) -> None:
    """As they would where something computes outside of what is watched."""
    one, _ = matrices(bones)
    for array in (np.stack([one.numpy()] * 2), np.ascontiguousarray(one.numpy()[:, :13]), one.numpy()[:, 1:]):
        with pytest.raises(Computed):
            bones.take_out(graph_of(torch.from_numpy(array.copy())))
    assert not bones.take_out(graph_of(one * 1.5))  # no row's numbers: what it holds is its own


@pytest.mark.parametrize(("mode", "weights"), [("merged", "int8"), ("branch", "fp32")])
def test_a_model_that_is_not_rows_is_drawn_from_its_weights(
    mode: str,
    weights: str,
    tiny_llama: tiny.TinyLlama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    request = (tiny_llama.fp32, [(adapter, 1.0)])
    target.export(*request, tmp_path / "skeleton", mode=mode, weights=weights)
    drawn: list[bool] = []

    def refuse(source: ComputedTensors) -> Skeleton:
        drawn.append(True)
        raise Computed("a weight is scaled")

    monkeypatch.setattr(Skeleton, "of", refuse)
    target.export(*request, tmp_path / "weights", mode=mode, weights=weights)
    assert drawn
    assert exported.files(tmp_path / "weights") == exported.files(tmp_path / "skeleton")


def test_its_digest_is_of_what_a_graph_depends_on(tiny_llama: tiny.TinyLlama, bones: Skeleton) -> None:
    """Norms and biases are in the graph as they are; of matrices their shapes."""

    def changed(name: str, tensor: torch.Tensor) -> str:
        return Skeleton(bones.source, {**bones.tensors, name: tensor}, bones.marks, bones.starts).digest

    norm, matrix = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
    assert changed(norm, bones.tensors[norm].clone()) == bones.digest
    assert changed(norm, bones.tensors[norm] + 1) != bones.digest
    assert changed(matrix, bones.tensors[matrix][:, :-1]) != bones.digest
