"""Readers of an adapter: PEFT's config and tensors, and packed vectors for ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzzing import bases, graphs
from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge.adapters import reading
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.runtime import adapters
from vera_edge.exporting import onnx_adapter
from vera_edge.merging.delta import Delta, merge_rows
from vera_edge.plans import plan as plans
from vera_edge.trained import fit, record
from vera_edge.trained.embeddings import with_tables
from vera_edge.trained.inspection import inspect_folder

GOLDEN = Path(__file__).parents[1] / "golden" / "adapters"
# What reading both asks, and takes seconds to import: not of the input that is first to need it.
_IMPORTED = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_INNER = "base_model.model.model"


@cache
def _cases() -> dict[str, Path]:
    """Adapters of the oldest and the newest PEFT, one of each kind."""
    kinds = ("saved-fp32", "unsaved-fp16", "modules-to-save", "one-layer")
    versions = sorted(GOLDEN.glob("peft-*"), key=lambda path: [int(n) for n in path.name[5:].split(".")])
    return {
        f"{version.name}-{kind}": version / kind
        for version in (versions[0], versions[-1])
        for kind in kinds
        if (version / kind).is_dir()
    }


def _written(folder: Path, kind: str) -> Path:
    """An adapter of another method, for one linear (160, 64) of the base, as PEFT writes it."""
    from safetensors.numpy import save_file

    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": "fp32",
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
        "target_modules": ["up_proj"],
        "peft_version": "0.21.2",
    }
    draw = np.random.default_rng(3)
    if kind == "ia3":
        config |= {"peft_type": "IA3", "feedforward_modules": [], "fan_in_fan_out": False}
        parts = {"ia3_l": draw.standard_normal((160, 1), np.float32)}
    else:
        config |= {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_dora": kind == "dora"}
        config |= {"rank_pattern": {"mlp.up_proj": 3}, "alpha_pattern": {"layers.[12].*": 5}}
        parts = {
            "lora_A.weight": draw.standard_normal((3, 64), np.float32),
            "lora_B.weight": draw.standard_normal((160, 3), np.float32),
        }
        if kind == "dora":
            parts["lora_magnitude_vector"] = np.ones(160, np.float32)
    tables: dict[str, Any] = {}
    if kind == "rows":
        config |= {"trainable_token_indices": {"embed_tokens": [3, 1]}}
        tables = {"token_adapter.trainable_tokens_delta": np.ones((2, bases.WIDTH), np.float32)}
    if kind == "table":
        config |= {"target_modules": ["up_proj", "embed_tokens"], "ensure_weight_tying": True}
        tables = {
            "lora_embedding_A": draw.standard_normal((2, bases.WORDS), np.float32),
            "lora_embedding_B": draw.standard_normal((bases.WIDTH, 2), np.float32),
        }
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {f"{_INNER}.layers.1.mlp.up_proj.{end}": array for end, array in parts.items()}
    tensors |= {f"{_INNER}.embed_tokens.{end}": array for end, array in tables.items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    return folder


@cache
def _other_methods() -> dict[str, Path]:
    return {
        kind: _written(graphs.scratch() / kind, kind) for kind in ("lora", "dora", "ia3", "table", "rows")
    }


def _peft(
    name: str, file: str, form: Form, whole: bool = False, cases: Callable[[], dict[str, Path]] = _cases
) -> Target:
    """One file of a PEFT folder. whole: read with its base as one model, as before a merge or an export."""

    def prepare(folder: Path) -> None:
        for module in _IMPORTED if whole or cases is _other_methods else ():
            import_module(module)
        bases.write_base(folder / "base")
        for case, source in cases().items():
            shutil.copytree(source, folder / case)

    def read(seed: Seed, folder: Path) -> object:
        own = folder / seed.beside
        (own / file).write_bytes(seed.data)
        try:
            if whole:
                return inspect_folder(own, folder / "base")
            adapter = reading.read(own)
            inspect_folder(own)
            checkpoint = _base(str(folder / "base"))
            record.notes(adapter, checkpoint)
            fit.check_fit(adapter, checkpoint)
            if cases is _other_methods:
                adapter = with_tables(adapter, checkpoint)
                for module in adapter.vectors:
                    weight = checkpoint.load(module)
                    merge_rows(module, weight, Delta(module, weight.shape[1], [(adapter, 1.0)], None))
            return plans.make(checkpoint, [(adapter, 1.0)])
        finally:
            shutil.copy(cases()[seed.beside] / file, own / file)

    def seeds() -> list[Seed]:
        return [Seed((source / file).read_bytes(), case) for case, source in cases().items()]

    return Target(name, form, seeds, read, prepare)


@cache
def _base(folder: str) -> Checkpoint:
    return Checkpoint.open(Path(folder))


def _onnx_adapter() -> Target:
    """The vectors of a graph, in a flatbuffer."""

    def prepare(folder: Path) -> None:
        graphs.write_branch(folder / "graph.onnx")

    def read(seed: Seed, folder: Path) -> object:
        path = folder / "a.onnx_adapter"
        path.write_bytes(seed.data)
        adapters.version(path)
        return adapters.load(path, graphs.opened(str(folder / "graph.onnx")), 7)

    @cache
    def seeds() -> list[Seed]:
        found = []
        for names in ((onnx_adapter.LAMBDA_B, onnx_adapter.LAMBDA_D), (onnx_adapter.LAMBDA_B,)):
            vectors = {
                name: np.ones((1, 1, size), np.float32) for name, size in zip(names, (6, 4), strict=False)
            }
            path = graphs.scratch() / "a.onnx_adapter"
            onnx_adapter.write(path, vectors, 7)
            found.append(Seed(path.read_bytes()))
        return found

    return Target("onnx-adapter", Form.BINARY, seeds, read, prepare)


def _card() -> Target:
    """The model card, of which is read how the base was loaded."""
    text = b"---\nload_in_4bit: True\n---\n- bnb_4bit_quant_type: nf4\n- bnb_4bit_use_double_quant: True\n"

    def prepare(folder: Path) -> None:
        shutil.copytree(_cases()["peft-0.21.2-one-layer"], folder / "a")
        bases.write_base(folder / "base")

    def read(seed: Seed, folder: Path) -> object:
        (folder / "a" / record.CARD).write_bytes(seed.data)
        return record.notes(reading.read(folder / "a"), _base(str(folder / "base")))

    words = ("load_in_8bit", "bnb_4bit_compute_dtype", "torch.bfloat16", "True", json.dumps("x"))
    return Target("adapter-card", Form.TEXT, lambda: [Seed(text)], read, prepare, words)


TARGETS = (
    _peft("adapter-config", CONFIG, Form.JSON),
    _peft("adapter-tensors", TENSORS, Form.SAFETENSORS),
    _peft("method-config", CONFIG, Form.JSON, cases=_other_methods),
    _peft("method-tensors", TENSORS, Form.SAFETENSORS, cases=_other_methods),
    _peft("adapter-config-with-base", CONFIG, Form.JSON, whole=True),
    _peft("adapter-tensors-with-base", TENSORS, Form.SAFETENSORS, whole=True),
    _onnx_adapter(),
    _card(),
)
