"""Readers of a bundle: manifest, chunk list, golden vectors, and the settings beside a graph."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzzing import graphs, texts
from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge.adapters.projection import ProjectionSpec
from vera_edge.bundle import chunks, contents
from vera_edge.bundle.contents import Manifest
from vera_edge.device.check import golden, golden_encoder
from vera_edge.device.runtime import pooling
from vera_edge.device.runtime.chat import BundleText
from vera_edge.device.runtime.decoding import Decoder, Steps
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.exporting.adapter_fit import module_shapes
from vera_edge.measuring.graph_file import GraphFile
from vera_edge.measuring.graph_parts import cut
from vera_edge.storage.files import sha256_bytes
from vera_edge.storage.json_text import canonical_json

HASH = "0" * 64
_MODULE = "model.layers.0.mlp.down_proj"


_DRAWN = {
    "size": 2560,
    "sha256": HASH,
    "dtype": "float32",
    "tensors": {"A": {"matrix": "A.T", "start": 0, "stop": 160, "offset": 0}},
}


def _facts() -> contents.ManifestFields:
    step = {"module": _MODULE, "action": "branch", "source": "nf4", "result": "nf4", "shape": [64, 160]}
    return contents.ManifestFields(
        kind="decoder",
        mode="branch",
        weights="nf4",
        base={"digest": HASH, "name": "tiny", "trained": {}},
        adapters={"demo": {"file": "adapters/demo.onnx_adapter", "digest": HASH}},
        default_adapter="demo",
        projection={**ProjectionSpec(3, 4, 160, 64).to_dict(), "digest": HASH},
        model_version=7,
        vectors=[(_MODULE, 0, 64)],
        generated={"onnx/projections": _DRAWN},
        plan={"version": 1, "steps": [{**step, "options": {"activations": "float"}}]},
        options={"head": "fp16"},
        exact=True,
        limits={"max_kl": 0.01},
        golden="golden.json",
        requires={"onnxruntime": "1.22"},
        cpu=["vnni"],
        tools={"vera-edge": "0.1"},
        checked={"tokens": 9, "bounds": {"n": 5}, "tolerance": 0.1},
    )


def _manifest() -> Target:
    files = {"onnx/model.onnx": b"graph", "adapters/demo.onnx_adapter": bytes(400), "golden.json": b"{}"}

    def prepare(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    @cache
    def seeds() -> list[Seed]:
        folder = graphs.scratch() / "bundle"
        folder.mkdir()
        prepare(folder)
        found = []
        merged: dict[str, Any] = {
            "mode": "merged",
            "vectors": [],
            "generated": {},
            "projection": None,
            "golden": None,
        }
        for facts in (_facts(), replace(_facts(), **merged)):
            contents.write(folder, facts)
            found.append(Seed((folder / contents.MANIFEST).read_bytes()))
        return found

    def read(seed: Seed, folder: Path) -> object:
        (folder / contents.MANIFEST).write_bytes(seed.data)
        manifest = contents.read(folder)
        _ = manifest.size, manifest.drawn, manifest.needs_vnni, manifest.expanded
        module_shapes(manifest)
        canonical_json(manifest.to_dict())
        return contents.verify(folder)

    return Target("manifest", Form.JSON, seeds, read, prepare, seal=_sealed)


def _sealed(data: bytes) -> bytes:
    """A changed manifest as one who means harm would write it: in canonical JSON, with a digest that fits."""
    try:
        value = json.loads(data)
        value.pop("digest", None)
        return canonical_json({**value, "digest": sha256_bytes(canonical_json(value))})
    except (ValueError, RecursionError, AttributeError, TypeError):
        return data


def _chunks() -> Target:
    listed = {name: [chunks.Chunk(0, 300, HASH), chunks.Chunk(300, 70_000, HASH)] for name in ("a", "onnx/b")}

    def read(seed: Seed, folder: Path) -> object:
        (folder / chunks.INDEX).write_bytes(seed.data)
        return chunks.read_index(folder / chunks.INDEX)

    return Target("chunks", Form.JSON, lambda: [Seed(chunks.index(listed))], read)


def _golden() -> Target:
    ids, log_p = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[-0.5, -1.0]] * 3)
    cases = [golden.Case(name, np.array([1, 2, 3]), 2, ids, log_p) for name in (None, "demo")]

    def read(seed: Seed, folder: Path) -> object:
        (folder / golden.FILE).write_bytes(seed.data)
        found = golden.read(folder / golden.FILE, 16)
        for case in found.cases:
            golden.compare(case, 0, np.zeros((len(case.tokens), 16), np.float32))
        return found

    seeds = [Seed(golden.to_bytes(golden.Golden("torch", tuple(cases))))]
    return Target("golden", Form.JSON, lambda: seeds, read)


def _golden_encoder() -> Target:
    values = np.linspace(-1, 1, 8, dtype=np.float32)
    cases = [
        golden_encoder.EncoderCase(name, "A text.", np.array([1, 2, 3]), values) for name in (None, "demo")
    ]

    def read(seed: Seed, folder: Path) -> object:
        (folder / golden.FILE).write_bytes(seed.data)
        return [case.encoded for case in golden_encoder.read(folder / golden.FILE)]

    return Target("golden-encoder", Form.JSON, lambda: [Seed(golden_encoder.to_bytes(cases, "torch"))], read)


def _genai_config() -> Target:
    decoder = {"num_key_value_heads": graphs.HEADS, "head_size": graphs.SIZE, "num_hidden_layers": 1}
    model = {"decoder": decoder, "context_length": 64, "vocab_size": graphs.WORDS, "eos_token_id": [1, 2]}
    value = {"model": model, "search": {"past_present_share_buffer": True, "max_length": 64}}

    def read(seed: Seed, folder: Path) -> object:
        (folder / "genai_config.json").write_bytes(seed.data)
        opened = Decoder.open(folder, graphs.opened(str(folder / "onnx/model.onnx")))
        tokens = np.array([1, 2, 3], np.int64)[: opened.context]
        return Steps(opened, opened.cache(len(tokens)), {}).prefill(tokens)

    def prepare(folder: Path) -> None:
        graphs.write_decoder(folder / "onnx/model.onnx")

    return Target("genai-config", Form.JSON, lambda: [Seed(json.dumps(value).encode())], read, prepare)


def _graph_in_parts() -> Target:
    """A decoder's graph as drift cuts it; ONNX Runtime itself isn't asked."""
    caches = [(f"past_key_values.0.{part}", f"present.0.{part}") for part in ("key", "value")]

    def seeds() -> list[Seed]:
        graphs.write_decoder(graphs.scratch() / "cut/model.onnx")
        return [Seed((graphs.scratch() / "cut/model.onnx").read_bytes())]

    def read(seed: Seed, folder: Path) -> object:
        (folder / "model.onnx").write_bytes(seed.data)
        graph = GraphFile.read(folder / "model.onnx")
        return graph.ports(), cut(graph, caches, 1)

    return Target("graph-in-parts", Form.BINARY, seeds, read)


def _encoder(gives: str, value: dict[str, Any]) -> Target:
    """config.json beside an encoder's graph."""

    def prepare(folder: Path) -> None:
        graphs.write_encoder(folder / "onnx/model.onnx", gives)
        (folder / "tokenizer.json").write_bytes(texts.tokenizer())

    def read(seed: Seed, folder: Path) -> object:
        (folder / "config.json").write_bytes(seed.data)
        entry = contents.FileEntry(1, HASH)
        facts = {**_facts().__dict__, "kind": "encoder", "mode": "merged"}
        manifest = Manifest(folder=folder, files={"onnx/model.onnx": entry}, digest=HASH, **facts)
        encoder = Encoder(manifest, graphs.opened(str(folder / "onnx/model.onnx")), BundleText(folder))
        return encoder.outputs(encoder.encode(["a b", "c"]))

    name = f"encoder-config-{'classes' if gives == 'logits' else 'embeddings'}"
    return Target(name, Form.JSON, lambda: [Seed(json.dumps(value).encode())], read, prepare)


_DENSE = {"in_features": 8, "out_features": 3, "bias": True,
          "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
_MODULES = [
    {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for number, (kind, path) in enumerate(
        (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("LayerNorm", "3_LayerNorm"),
         ("Normalize", "4_Normalize"))
    )
]  # fmt: skip
_SENTENCES: dict[str, Any] = {
    pooling.MODULES: _MODULES,
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
    "2_Dense/config.json": _DENSE,
    "3_LayerNorm/config.json": {"dimension": 3},
    pooling.LONGEST: {"max_seq_length": 64, "do_lower_case": False},
    pooling.PROMPTS: {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
}


def _sentences(folder: Path) -> None:
    from safetensors.numpy import save_file

    for name, value in _SENTENCES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    ones = np.ones
    dense = {"linear.weight": ones((3, 8), np.float32), "linear.bias": ones(3, np.float32)}
    save_file(dense, folder / "2_Dense/model.safetensors")
    norm = {"norm.weight": ones(3, np.float32), "norm.bias": ones(3, np.float32)}
    save_file(norm, folder / "3_LayerNorm/model.safetensors")


def _pooling(name: str, file: str, form: Form = Form.JSON) -> Target:
    """One file of a sentence-transformers folder."""

    def read(seed: Seed, folder: Path) -> object:
        (folder / file).write_bytes(seed.data)
        return pooling.read(folder, 8).embeddings(np.ones((2, 3, 8), np.float32), np.ones((2, 3), np.int64))

    def seeds() -> list[Seed]:
        if form is Form.JSON:
            return [Seed(json.dumps(_SENTENCES[file]).encode())]
        folder = graphs.scratch() / name
        folder.mkdir(exist_ok=True)
        _sentences(folder)
        return [Seed((folder / file).read_bytes())]

    return Target(name, form, seeds, read, _sentences)


_CLASSES = {"model_type": "bert", "id2label": {"0": "no", "1": "yes"}, "problem_type": None,
            "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
_STATES = {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}
TARGETS: tuple[Target, ...] = (
    _manifest(),
    _chunks(),
    _golden(),
    _golden_encoder(),
    _genai_config(),
    _graph_in_parts(),
    _encoder("logits", _CLASSES),
    _encoder("last_hidden_state", _STATES),
    _pooling("pooling-modules", pooling.MODULES),
    _pooling("pooling-config", "1_Pooling/config.json"),
    _pooling("pooling-dense", "2_Dense/config.json"),
    _pooling("pooling-norm", "3_LayerNorm/config.json"),
    _pooling("pooling-weights", "2_Dense/model.safetensors", Form.SAFETENSORS),
    _pooling("pooling-length", pooling.LONGEST),
    _pooling("pooling-prompts", pooling.PROMPTS),
)
