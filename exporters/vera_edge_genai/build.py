"""Runs ONNX Runtime GenAI's model builder on a float32 folder, quietly, and reads back its graph."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import transformers

from vera_edge.errors import TargetError
from vera_edge.loading import offline

FILENAME = "model.onnx"
# Some versions of the builder run a model's own code unless told, and use the token of who is logged in.
_LOCAL = {"hf_remote": "false", "hf_token": "false"}


def build(source: Path, out: Path, architecture: str, options: Mapping[str, str]) -> ir.Model:
    """The float32 CPU graph of the model in folder `source`; the builder's files land in `out`.

    options: the builder's extra options. Raises TargetError when the builder doesn't take the architecture.
    """
    with _quiet():
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        _teach_gemma3()
        cache = str(out / "cache")
        extra = [f"{key}={value}" for key, value in ({**_LOCAL, **options}).items()]
        try:
            prepared = parse_extra_options(None, str(source), str(out), "fp32", "cpu", cache, extra)
            create_model(None, str(source), str(out), "fp32", "cpu", cache, **prepared)
        except NotImplementedError:
            raise TargetError(
                f"ONNX Runtime GenAI's model builder doesn't know the architecture {architecture}; "
                "merge the adapter (vera-edge merge) and export the result with a tool that does"
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as cause:
            what = str(cause).strip().splitlines() or [type(cause).__name__]
            raise TargetError(
                f"ONNX Runtime GenAI's model builder failed on this {architecture}: {what[0][:300]}"
            ) from cause
    return ir.load(out / FILENAME)


def drawn(out: Path) -> ir.Model | None:
    """What `build` left in `out` before; None when it wasn't there."""
    return ir.load(out / FILENAME) if (out / FILENAME).is_file() else None


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


def _teach_gemma3() -> None:
    """Let the builder read Gemma 3's two rotary embeddings where transformers 5 keeps them.

    Its reader knows transformers 4's flat settings only; for Gemma 4 it reads the nested ones, as done here.
    """
    from onnxruntime_genai.models import builder

    if getattr(builder.Gemma3Model, "reads_nested", False):
        return

    class Gemma3Model(builder.Gemma3Model):
        reads_nested = True

        def make_rope_init(self, config: Any) -> None:
            rope = config.rope_parameters
            if "full_attention" not in rope:
                super().make_rope_init(config)
                return
            kinds = {rope[layers]["rope_type"] for layers in ("full_attention", "sliding_attention")}
            if kinds != {"default"}:
                raise ValueError(f"it can't scale one of two rotary embeddings ({', '.join(sorted(kinds))})")
            self.rope_attrs["theta"] = rope["full_attention"]["rope_theta"]
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]

    builder.Gemma3Model = Gemma3Model
