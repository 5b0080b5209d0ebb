"""Runs ONNX Runtime GenAI's model builder on a float32 folder, quietly, and reads back its graph."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import transformers

from vera_edge.errors import TargetError
from vera_edge.quiet import offline
from vera_edge_onnx.graph.computed import ComputedWeight, put_in
from vera_edge_onnx.graph.skeleton import Computed, Skeleton

FILENAME = "model.onnx"
# Some versions of the builder run a model's own code unless told, and use the token of who is logged in.
_LOCAL = {"hf_remote": "false", "hf_token": "false"}


def build(source: Path, out: Path, architecture: str, options: Mapping[str, str]) -> ir.Model:
    """The float32 CPU graph of the model in folder `source`; the builder's files land in `out`.

    options: the builder's extra options. Raises TargetError when the builder doesn't take the architecture.
    """
    try:
        _run(source, out, options)
    except NotImplementedError:
        raise _unknown(architecture) from None
    except _FAILURES as cause:
        what = str(cause).strip().splitlines() or [type(cause).__name__]
        raise TargetError(
            f"ONNX Runtime GenAI's model builder failed on this {architecture}: {what[0][:300]}"
        ) from cause
    return ir.load(out / FILENAME)


def build_from(
    skeleton: Skeleton, source: Path, out: Path, architecture: str, options: Mapping[str, str]
) -> ir.Model:
    """`build` of a model whose weights are computed when they're read; `source` holds none.

    Raises Computed when the builder does more with weights than to move their rows about.
    """
    weights: dict[str, ComputedWeight] = {}

    def take_out(graph: ir.Graph) -> None:
        weights.update(skeleton.take_out(graph))

    try:
        with skeleton.loaded_instead():
            _run(source, out, options, take_out)
    except NotImplementedError:
        raise _unknown(architecture) from None
    except _FAILURES as cause:
        raise Computed(str(cause)) from cause
    model = ir.load(out / FILENAME)
    put_in(model, weights)
    return model


_FAILURES = (ValueError, KeyError, AttributeError, TypeError, RuntimeError, OSError)


def _run(
    source: Path,
    out: Path,
    options: Mapping[str, str],
    before_saving: Callable[[ir.Graph], None] | None = None,
) -> None:
    with _quiet(), _corrected(before_saving):
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        cache = str(out / "cache")
        extra = [f"{key}={value}" for key, value in ({**_LOCAL, **options}).items()]
        prepared = parse_extra_options(None, str(source), str(out), "fp32", "cpu", cache, extra)
        create_model(None, str(source), str(out), "fp32", "cpu", cache, **prepared)


def _unknown(architecture: str) -> TargetError:
    return TargetError(
        f"ONNX Runtime GenAI's model builder doesn't know the architecture {architecture}; "
        "merge the adapter (vera-edge merge) and export the result with a tool that does"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the builder's talk and bars off the terminal, and transformers off the network."""
    bars = os.environ.get("TQDM_DISABLE")
    level, verbosity = logging.root.manager.disable, transformers.logging.get_verbosity()
    handlers, root_level = list(logging.root.handlers), logging.root.level
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    try:
        with offline(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        # The builder, and what it imports, set these for all of the process.
        transformers.logging.set_verbosity(verbosity)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(root_level)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars


@contextlib.contextmanager
def _corrected(before_saving: Callable[[ir.Graph], None] | None) -> Iterator[None]:
    """Correct, while it lasts, what the builder takes for something else.

    The head: it takes every linear with as many outputs as the vocabulary for it. Gemma 3's two rotary
    embeddings: its reader knows transformers 4's flat settings only; the tables are replaced in any case.
    OLMo's norms: it takes them for root mean square norms, and they subtract the mean too. Its own commit: it
    writes that of whatever repository it lies in into the graph, so that other bytes came of the same inputs.
    before_saving: gets the graph when it's drawn.
    """
    from onnxruntime_genai.models import builder

    def has_lm_head(self: Any, module: Any) -> bool:
        return module is self.weights.get_output_embeddings()

    def make_rope_init(self: Any, config: Any) -> None:
        config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]

    def make_layernorm(self: Any, *arguments: Any, **options: Any) -> None:
        self.layernorm_attrs["epsilon"] = 1e-5
        layer_norm(self, *arguments, **options | {"simple": False})

    def save_model(self: Any, folder: str) -> None:
        if before_saving is not None:
            before_saving(self.model.graph)
        save(self, folder)

    save = builder.Model.save_model
    layer_norm = builder.OLMoModel.make_layernorm
    patches: list[tuple[Any, str, Any]] = [
        (builder.Model, "has_lm_head", has_lm_head),
        (builder.Gemma3Model, "make_rope_init", make_rope_init),
        (builder.OLMoModel, "make_layernorm", make_layernorm),
        (builder.Model, "save_model", save_model),
        (builder.Model, "get_genai_commit", classmethod(lambda _: None)),
    ]
    before = [(cls, name, cls.__dict__.get(name)) for cls, name, _ in patches]
    for cls, name, method in patches:
        setattr(cls, name, method)
    try:
        yield
    finally:
        for cls, name, method in before:
            delattr(cls, name) if method is None else setattr(cls, name, method)
