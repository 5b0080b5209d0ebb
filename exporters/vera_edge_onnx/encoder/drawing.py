"""Draws the float32 graph of an encoder or a classifier with transformers' own ONNX exporter.

Optimum must know the task by the same name; names of inputs and outputs are those that its ORTModel classes
and Transformers.js ask for. Axes are dynamic where a caller may choose them: the batch, and the sequence of a
text. A decoder's class without a head for words, or with one for classes, is drawn in the same way, without
the cache that generating takes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import transformers
from optimum.exporters.tasks import TasksManager

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import TargetError
from vera_edge.merging.computed import ComputedTensors
from vera_edge.quiet import offline
from vera_edge.reference.model import load_dense, load_from
from vera_edge.storage.json_text import canonical_json
from vera_edge.tasks import task as tasks
from vera_edge_onnx.classes import ENCODER_OF
from vera_edge_onnx.graph.computed import Outline, put_in
from vera_edge_onnx.graph.skeleton import Skeleton
from vera_edge_onnx.graph.weaver import Weaver

BATCH, SEQUENCE = "batch_size", "sequence_length"
# The lowest opset with Gelu and with LayerNormalization as one node; ONNX Runtime 1.22 reads up to 23.
OPSET = 20
# Tasks that give all they have in one forward pass.
TASKS = (
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "audio-classification",
)
_SCOPES = "pkg.torch.onnx.name_scopes"
# The last graphs that were drawn from skeletons, by all that decides them: tracing takes seconds, and a
# release exports one base several times.
_DRAWN: dict[str, Outline] = {}
_KEPT = 16  # each without its matrices


@dataclass(frozen=True)
class EncoderTask:
    """What a model does: the task's name, the transformers class that loads a model for it, what it takes.

    half: only the encoder of the model does it.
    """

    name: str
    auto_class: str
    main_input: str = "input_ids"
    half: bool = False

    @property
    def takes_text(self) -> bool:
        return self.main_input == "input_ids"


def task(architecture: str, model_type: str) -> EncoderTask:
    """The task of a model class by its name; raises TargetError when none of TASKS, or of another type."""
    found: Any = getattr(transformers, architecture, None)
    if architecture in ENCODER_OF and found.config_class.model_type == model_type:
        return EncoderTask("feature-extraction", ENCODER_OF[architecture], found.main_input_name, half=True)
    known = tasks.of_class(architecture)
    try:
        name = TasksManager.infer_task_from_model(found, library_name="transformers")
    except (ValueError, KeyError, AttributeError):
        name = ""
    if name not in TASKS or name != known.name:
        raise TargetError(
            f"{architecture} is neither a decoder nor an encoder that can be exported ({', '.join(TASKS)}); "
            "merge the adapter (vera-edge merge) and export the result with a tool that takes it"
        )
    if found.config_class.model_type != model_type:
        raise TargetError(f"config.json names {architecture}, which isn't of model type {model_type!r}")
    return EncoderTask(known.name, known.auto_class, found.main_input_name)


def draw(checkpoint: Checkpoint, task: EncoderTask) -> ir.Model:
    """The float32 graph of a checkpoint, its MatMul nodes named after the modules they belong to.

    Where the checkpoint's weights are `ComputedTensors` the graph's are computed too, and drawing it takes
    no room for them. Raises CheckpointError when transformers can't load it, TargetError when it can't draw
    it, Computed when it has to be drawn from weights that are there.
    """
    if not isinstance(checkpoint.tensors, ComputedTensors):
        return _named(_exported(load_dense(checkpoint, task.auto_class), task))
    skeleton = Skeleton.of(checkpoint.tensors)
    key = f"{skeleton.digest} {task} {canonical_json(checkpoint.config).decode()}"
    if key not in _DRAWN:
        model = load_from(checkpoint, skeleton.tensors, task.auto_class)
        skeleton.check_in(model)
        graph = _exported(model, task)
        put_in(graph, skeleton.take_out(graph.graph))
        while len(_DRAWN) >= _KEPT:
            _DRAWN.pop(next(iter(_DRAWN)))
        _DRAWN[key] = Outline.of(_named(graph))
    return _DRAWN[key].filled(checkpoint.tensors)


def _named(graph: ir.Model) -> ir.Model:
    _name_axes(graph)
    _split_gemms(graph)
    _name_products(graph)
    return graph


def _exported(whole: Any, task: EncoderTask) -> ir.Model:
    model = whole.get_encoder() if task.half else whole
    _check_form(model, task)
    model.config.use_cache = False
    inputs = _inputs(model)
    axes = {
        name: {0: torch.export.Dim.AUTO} | ({1: torch.export.Dim.AUTO} if value.ndim == 2 else {})
        for name, value in inputs.items()
    }
    with _quiet():
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        settings = OnnxConfig(dynamic=True, dynamic_shapes=axes, opset_version=OPSET)
        try:
            graph: ir.Model = OnnxExporter().export(model, inputs, config=settings).program
        except Exception as cause:  # torch.export raises many kinds, down to AssertionError
            what = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300]
            raise TargetError(
                f"transformers' ONNX exporter failed on {type(model).__name__}: {what}"
            ) from cause
    return graph


def _check_form(model: Any, task: EncoderTask) -> None:
    """Raise TargetError for a model whose graph would hold for some texts only.

    A classifier of a decoder's class looks for the last token that isn't padding. Scaling that depends on a
    text's length is a choice in Python, which a graph has made once.
    """
    config = model.config.get_text_config()
    if task.name == "text-classification" and getattr(config, "pad_token_id", 0) is None:
        raise TargetError(
            f"a {type(model).__name__} finds the end of a text by its padding token, and neither config.json "
            "nor the tokenizer names one; set pad_token_id in the base's config.json, as in training"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, Mapping)]
    if task.takes_text and (varying := {"dynamic", "longrope"} & set(map(str, kinds))):
        raise TargetError(
            f"{type(model).__name__} scales its rotary embeddings by a text's length ({min(varying)}), which "
            "one graph can't; merge the adapter (vera-edge merge) and run the result in transformers"
        )


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    """Sample inputs (2, 8) of a text model, (2, channels, height, width) of a vision model, and so on."""
    config, main = model.config, model.main_input_name
    if main == "input_ids":
        inputs = {main: torch.full((2, 8), 3), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
        if getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.zeros(2, 8, dtype=torch.int64)
        return inputs
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.rand(2, config.num_channels, height, width)}
    if main == "input_features" and hasattr(config, "max_source_positions"):
        return {main: torch.rand(2, config.num_mel_bins, 2 * config.max_source_positions)}
    raise TargetError(
        f"{type(model).__name__} takes {main}, and only models of input_ids, pixel_values or whole windows "
        "of input_features can be exported; merge the adapter (vera-edge merge) and use another tool"
    )


def _name_axes(graph: ir.Model) -> None:
    """Call the dynamic axes what consumers call them, wherever a shape mentions them."""
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        assert value.shape is not None
        for axis, name in ((0, BATCH), (1, SEQUENCE)):
            size = value.shape[axis]
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names[str(size.value)] = name
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = [*graph.graph.inputs, *(output for node in graph.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, pattern, names) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, pattern: re.Pattern[str], names: dict[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    return None if size.value is None else pattern.sub(lambda found: names[found[1]], str(size.value))


def _split_gemms(graph: ir.Model) -> None:
    """Make each linear on a plain matrix the MatMul and Add that it's everywhere else."""
    for node in list(graph.graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        attributes = {name: value.value for name, value in node.attributes.items()}
        plain = attributes.get("alpha", 1.0) == 1.0 == attributes.get("beta", 1.0)
        if weight is not None and weight.const_value is not None and plain and not attributes.get("transA"):
            _split(graph, node, weight, bool(attributes.get("transB")))


def _split(graph: ir.Model, gemm: ir.Node, weight: ir.Value, transposed: bool) -> None:
    weaver = Weaver(graph)
    x, bias, output = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None, gemm.outputs[0]
    assert x is not None and weight.const_value is not None and output.shape is not None
    own = weaver.as_factor(f"{weight.name}.T", weight.const_value, transposed)
    shape = tuple(size if isinstance(size, int) else size.value for size in output.shape)
    made = weaver.node("MatMul", [x, own], f"{gemm.name}/MatMul", shape, before=gemm)
    product = made.producer()
    assert product is not None
    product.metadata_props.update(gemm.metadata_props)
    if bias is not None:
        made = weaver.node("Add", [made, bias], f"{gemm.name}/Add", shape, before=gemm)
    weaver.take_over(gemm, made)


def _name_products(graph: ir.Model) -> None:
    """Name each product with a weight after its module: "encoder.layer.0.output.dense/MatMul"."""
    taken: set[str] = set()
    for node in graph.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[1].const_value is None:
            continue
        module = _module(node)
        name, count = f"{module}/MatMul", 1
        while name in taken:
            count += 1
            name = f"{module}/{count}/MatMul"
        taken.add(name)
        node.name = name


def _module(node: ir.Node) -> str:
    """The innermost module that the exporter says a node belongs to."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    # The last scope is the operation itself.
    return next((scope for scope in reversed(scopes[:-1]) if scope), node.name or "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter off the network, and its talk off the terminal."""
    level, verbosity = logging.root.manager.disable, transformers.logging.get_verbosity()
    logging.disable(logging.WARNING)
    try:
        with (
            offline(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        transformers.logging.set_verbosity(verbosity)
