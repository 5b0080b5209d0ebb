"""Every float graph is the model, past what its config bounds, or it isn't exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from scripts.make_config_table import TABLE, table
from tests import exported, tiny, tiny_encoder
from tests.config_fields import CARRIED, CASES, ROPE, Case
from tests.families import Family
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session
from vera_edge.errors import TargetError, VeraEdgeError
from vera_edge.exporting import target
from vera_edge.reference.model import TorchReference
from vera_edge_onnx.decoder import attention, drawing, parity, replica, rotary_graph
from vera_edge_onnx.decoder.rotary import Rotary, RotaryTable, all_parameters
from vera_edge_onnx.encoder import drawing as encoder_drawing
from vera_edge_onnx.parity import Differs
from vera_edge_onnx.running import opened_graph


def outcome(case: Case, folder: Path) -> str:
    """Draw a case and hold it against transformers: "carried", or why not."""
    model = case.model()
    base = tiny.save(model, folder / "base")
    try:
        drawn = drawing.draw(
            Checkpoint.open(base), model.config, case.architecture, folder / "graph", fuse_qkv=True
        )
        lengths = parity.lengths_of(drawn.config, parity.bounds_of(drawn.config, drawn.windows))
        assert lengths.reached
        running = opened_graph(drawn.model, drawn.path.with_name("compared.onnx"))
        parity.compare(running, TorchReference(model, model.config.vocab_size, False), lengths)
    except (VeraEdgeError, Differs) as cause:
        return str(cause)
    return CARRIED


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_setting_is_carried_or_refused(case: Case, tmp_path: Path) -> None:
    found = outcome(case, tmp_path)
    assert (found == CARRIED) == (case.outcome == CARRIED), found


def test_the_table_in_the_docs_is_made_of_these_cases() -> None:
    assert TABLE.read_text() == table(), "run scripts/make_config_table.py"


def base_of(architecture: str, folder: Path, **changes: Any) -> tuple[Path, Path, Any]:
    """A tiny model with these settings, an adapter for it, and the model itself."""
    case = Case(architecture, "as it is", changes)
    model = case.model()
    base = tiny.save(model, folder / "base")
    targets = ["qkv_proj", "o_proj"] if architecture.startswith("Phi3") else ["q_proj", "v_proj", "o_proj"]
    return base, tiny.make_adapter(base, folder / "adapter", targets=targets), model


WINDOWED: list[tuple[str, dict[str, Any]]] = [
    ("MistralForCausalLM", {"sliding_window": 8}),
    ("Phi3ForCausalLM", {"sliding_window": 8}),
    ("Phi3ForCausalLM", {"sliding_window": 100, "max_position_embeddings": 256}),
    ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 1e4, **ROPE["linear"]}}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 1e4, **ROPE["yarn"]}}),
    ("SmolLM3ForCausalLM", {"rope_parameters": {"rope_theta": 1e4, **ROPE["yarn"]}}),
    ("Qwen3ForCausalLM", {"rope_parameters": {"rope_theta": 1e4, **ROPE["yarn"]}}),
    ("NemotronForCausalLM", {}),
    ("LlamaForCausalLM", {"intermediate_size": tiny.VOCABULARY}),
]


@pytest.mark.parametrize("mode", ["merged", "branch"])
@pytest.mark.parametrize(("architecture", "changes"), WINDOWED)
def test_an_export_is_what_peft_computes(
    architecture: str, changes: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    base, adapter, _ = base_of(architecture, tmp_path, **changes)
    result = target.export(base, [(adapter, 1.0)], tmp_path / "out", mode=mode)
    ids = exported.tokens(110)
    truth = exported.peft_logits(base, adapter, ids)
    assert exported.error(exported.logits(result.folder, ids, result.adapters.get("default")), truth) < 1e-4
    assert exported.error(Session.open(result.folder).logits(ids), truth) < 1e-4
    exported.assert_same_in_parts(result.folder, ids)
    checked = bundle.read(result.folder).checked
    assert checked is not None and checked["tokens"] >= 48
    assert all(checked["tokens"] > bound for bound in checked["bounds"].values())


def test_a_window_too_long_to_run_is_seen_on_a_small_copy(tmp_path: Path) -> None:
    changes = {"sliding_window": 4096, "max_position_embeddings": 32768}
    base, adapter, _ = base_of("MistralForCausalLM", tmp_path, **changes)
    result = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    checked = bundle.read(result.folder).checked
    assert checked is not None
    assert checked["bounds"] == {"sliding_window": 4096} and checked["tokens"] < 4096
    shrunk = checked["shrunk"]
    assert 0 < shrunk["bounds"]["sliding_window"] < shrunk["tokens"]


def with_attribute(attribute: ir.Attr) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for node in model.graph:
            if attribute.name in node.attributes:
                node.attributes[attribute.name] = attribute

    return change


BY_HAND: list[tuple[str, dict[str, Any], str]] = [
    ("MistralForCausalLM", {"sliding_window": 8}, "window"),
    ("MistralForCausalLM", {"sliding_window": 4096, "max_position_embeddings": 32768}, "window"),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": 2.0}, "softcap"),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 1e4, **ROPE["linear"]}}, "scaling"),
    ("Phi3ForCausalLM", {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
      "rope_parameters": {"rope_theta": 1e4, **ROPE["longrope"], "original_max_position_embeddings": 4096}},
     "switch"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "what"), BY_HAND)
def test_a_graph_that_lacks_a_setting_is_refused(
    architecture: str, changes: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is taken out of the graph by hand, as a builder that doesn't know it would leave it out."""
    base, adapter, _ = base_of(architecture, tmp_path, **changes)
    if what == "window":
        monkeypatch.setattr(attention, "put_in", lambda *_: None)
    elif what == "scaling":
        monkeypatch.setattr(rotary_graph, "put_in", lambda *_: None)
    elif what == "switch":  # past it, other factors than the model's
        chosen = rotary_graph._chosen_by_length

        def mixed_up(edits: Any, names: Any, tables: Rotary, before: Any) -> Any:
            assert isinstance(tables.beyond, RotaryTable)
            beyond = RotaryTable(tables.beyond.cos[:, ::-1], tables.beyond.sin[:, ::-1])
            return chosen(edits, names, replace(tables, beyond=beyond), before)

        monkeypatch.setattr(rotary_graph, "_chosen_by_length", mixed_up)
    else:
        before = attention.put_in

        def uncapped(model: ir.Model, *arguments: Any) -> None:
            before(model, *arguments)
            with_attribute(ir.AttrFloat32("softcap", 0.0))(model)

        monkeypatch.setattr(attention, "put_in", uncapped)
    with pytest.raises(TargetError, match=rf"isn't what {architecture} computes") as caught:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "\n" not in str(caught.value) and "layers.0" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_first_layer_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = base_of(
        "Qwen2ForCausalLM", tmp_path,
        sliding_window=8, use_sliding_window=True, max_window_layers=1,
    )  # fmt: skip
    monkeypatch.setattr(attention, "put_in", lambda *_: None)  # the builder applies windows by layer itself
    target.export(base, [(adapter, 1.0)], tmp_path / "fine")

    def without_window(model: ir.Model, *_: Any) -> None:
        with_attribute(ir.AttrInt64("local_window_size", -1))(model)

    monkeypatch.setattr(attention, "put_in", without_window)
    with pytest.raises(TargetError, match=r"first in what model\.layers\.1\.self_attn\.o_proj reads"):
        target.export(base, [(adapter, 1.0)], tmp_path / "out")


def test_a_setting_that_nothing_carries_is_not_called_an_unknown_architecture(tmp_path: Path) -> None:
    base, adapter, _ = base_of("OlmoForCausalLM", tmp_path, clip_qkv=0.5)
    with pytest.raises(TargetError, match="isn't what OlmoForCausalLM computes") as caught:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "doesn't know" not in str(caught.value)


# RoPE that depends on the length of the whole sequence, on the device.

BY_LENGTH = {
    "longrope": ("Phi3ForCausalLM", {
        "original_max_position_embeddings": 64, "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": 1e4, **ROPE["longrope"]}}),
    "dynamic": ("LlamaForCausalLM", {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 1e4, **ROPE["dynamic"], "factor": 8.0}}),
}  # fmt: skip


@pytest.fixture(scope="module", params=BY_LENGTH)
def by_length(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Any]:
    """(kind, base, adapter, export) of a model whose keys depend on the length of the text."""
    folder = tmp_path_factory.mktemp(request.param)
    architecture, changes = BY_LENGTH[request.param]
    base, adapter, _ = base_of(architecture, folder, **changes)
    return request.param, base, adapter, target.export(base, [(adapter, 1.0)], folder / "out")


@pytest.mark.parametrize("count", [40, 64, 65, 200, 400])
def test_a_prompt_across_the_switch_may_be_fed_in_chunks(
    count: int, by_length: tuple[str, Path, Path, Any]
) -> None:
    _, base, adapter, result = by_length
    session = Session.open(result.folder)
    ids = exported.tokens(count)
    truth = exported.peft_logits(base, adapter, ids)
    assert exported.error(session.logits(ids), truth) < 1e-4
    exported.assert_same_in_parts(result.folder, ids)


def greedy(base: Path, adapter: Path, ids: exported.Int64, count: int) -> list[int]:
    """What transformers generates with PEFT's unmerged adapter."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny.load(base), adapter).eval()
    tokens = torch.from_numpy(ids[None])
    found = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in found[0, len(ids) :]]


def test_text_is_generated_across_the_switch_as_transformers_does(
    by_length: tuple[str, Path, Path, Any],
) -> None:
    _, base, adapter, result = by_length
    session, ids = Session.open(result.folder), exported.tokens(56)
    generation = session.generate(ids, max_tokens=20)
    list(generation)
    expected = greedy(base, adapter, ids, 20)
    ended = next((at for at, token in enumerate(expected) if token in session.decoder.ends), 20)
    assert generation.tokens == expected[:ended]


def test_rows_of_a_batch_are_rotated_each_by_its_own_length(by_length: tuple[str, Path, Path, Any]) -> None:
    session = Session.open(by_length[3].folder)
    prompts = [exported.tokens(count, seed=count) for count in (30, 60, 90)]
    batch = session.generate_batch(prompts, max_tokens=12)
    list(batch)
    for row, prompt in enumerate(prompts):
        alone = session.generate(prompt, max_tokens=12)
        list(alone)
        assert batch.tokens[row] == alone.tokens


def test_the_reference_forgets_longer_texts(by_length: tuple[str, Path, Path, Any]) -> None:
    """transformers goes on rotating by the longest text it saw, in a model that is used twice."""
    from vera_edge.base.checkpoint import Checkpoint
    from vera_edge.reference.model import open_reference
    from vera_edge.trained import alignment, provenance

    _, base, adapter, _ = by_length
    checkpoint = Checkpoint.open(base)
    read = alignment.read(adapter, checkpoint)
    projections = provenance.resolve(read, checkpoint).projections
    reference = open_reference(checkpoint, [(read, 1.0)], projections)
    reference.logits(exported.tokens(300))
    ids = exported.tokens(100)
    assert exported.error(reference.logits(ids), exported.peft_logits(base, adapter, ids)) < 1e-5


@pytest.mark.parametrize("name", ["OpenLlama", "Bloom"])
def test_an_unknown_architecture_is_called_so(name: str, tmp_path: Path, tiny_llama: tiny.TinyLlama) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_llama.fp32, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": [f"{name}ForCausalLM"]}))
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter")
    with pytest.raises(TargetError, match=f"doesn't know the architecture {name}"):
        target.export(base, [(adapter, 1.0)], tmp_path / "out")


KEPT = (
    "head_dim",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "residual_multiplier",
    "query_pre_attn_scalar",
    "hidden_act",
    "attention_bias",
    "tie_word_embeddings",
)


def test_a_small_copy_keeps_what_changes_the_mathematics() -> None:
    for case in CASES:
        given = case.config()
        small = replica.shrunk(given)
        types = [set(getattr(config, "layer_types", None) or ()) for config in (small, given)]
        assert types[0] == types[1]
        for name in KEPT:
            assert getattr(small, name, None) == getattr(given, name, None), (case.name, name)
        kinds = [each.get("rope_type") for each in all_parameters(given)]
        assert kinds == [each.get("rope_type") for each in all_parameters(small)]


MODERN = Family(
    "ModernBertModel",
    ("Wqkv", "Wo", "Wi"),
    {
        "vocab_size": 160,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "local_attention": 16,
        "global_attn_every_n_layers": 3,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
)


def test_an_encoder_with_local_attention_is_checked_past_it(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(MODERN, tmp_path)
    result = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    checked = bundle.read(result.folder).checked
    assert checked is not None and checked["tokens"] > checked["bounds"]["local_attention"] == 16


@pytest.mark.parametrize("family", [tiny_encoder.EMBEDDINGS, tiny_encoder.classifier()])
def test_an_encoders_graph_that_computes_something_else_is_refused(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tiny_encoder.make(family, tmp_path)
    draw = encoder_drawing.draw

    def wrong(*arguments: Any) -> ir.Model:
        model = draw(*arguments)
        norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
        return model

    monkeypatch.setattr(encoder_drawing, "draw", wrong)
    with pytest.raises(TargetError, match=rf"isn't what {family.model} computes") as caught:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "layer.0" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
