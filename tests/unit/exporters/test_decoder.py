"""Whole exports of tiny decoders, held against PEFT's own forward and against the checkpoint's bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import exported, tiny
from vera_edge.bundle import contents as bundle
from vera_edge.errors import MismatchError, OutputError, PlanError, TargetError, VeraEdgeError
from vera_edge.exporting import target
from vera_edge.trained.inspection import inspect_folder

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def float_adapter(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny Llama in float32, so that PEFT alone gives the truth."""
    return tiny.make_adapter(tiny_llama.fp32, tmp_path_factory.mktemp("float") / "adapter")


@pytest.fixture(scope="module")
def make(tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Exports, each made once: make(mode, weights, base=..., adapter=..., **options)."""
    done: dict[str, Path] = {}

    def export(
        mode: str, weights: str, base: Path | None = None, adapter: Path | None = None, **options: Any
    ) -> Path:
        base, adapter = base or tiny_llama.fp32, adapter or float_adapter
        key = repr((mode, weights, base, adapter, options))
        if key not in done:
            out = tmp_path_factory.mktemp("export") / "out"
            target.export(base, [(adapter, 1.0)], out, mode=mode, weights=weights, options=options)
            done[key] = out
        return done[key]

    return export


def adapter_of(folder: Path) -> Path:
    return folder / "adapters" / "default.onnx_adapter"


@pytest.mark.parametrize("mode", ["merged", "branch"])
def test_fp32_agrees_with_peft(
    mode: str, make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path
) -> None:
    ids, out = exported.tokens(), make(mode, "fp32")
    truth = exported.peft_logits(tiny_llama.fp32, float_adapter, ids)
    found = exported.logits(out, ids, adapter_of(out) if mode == "branch" else None)
    assert exported.error(found, truth) < 1e-5
    base = exported.peft_logits(tiny_llama.fp32, float_adapter, ids, active=False)
    assert exported.error(base, truth) > 0.1  # so that a lost adapter would have failed


def test_without_vectors_a_branch_is_the_base(
    make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path
) -> None:
    ids = exported.tokens()
    truth = exported.peft_logits(tiny_llama.fp32, float_adapter, ids, active=False)
    assert exported.error(exported.logits(make("branch", "fp32"), ids), truth) < 1e-5


@pytest.mark.parametrize(
    ("mode", "weights", "options", "limit"),
    [
        ("branch", "fp16", {}, 1e-4),
        ("branch", "int8", {}, 0.02),
        ("branch", "int8", {"projections": "int4"}, 0.03),
        ("branch", "int4", {"head": "int8"}, 0.4),
        ("branch", "nf4", {"projections": "int8"}, 0.4),
        ("merged", "fp16", {}, 1e-4),
        ("merged", "int8", {}, 0.02),
        ("merged", "int4", {}, 0.4),
        ("merged", "fp4", {}, 0.6),
        ("branch", "int4", {"block": "16", "symmetric": "true", "accuracy_level": "0"}, 0.4),
        ("merged", "int8", {"block": "128", "symmetric": "false"}, 0.02),
        ("merged", "int2", {"block": "16"}, 4.0),
    ],
)
def test_drift_is_of_the_size_of_the_format(
    mode: str,
    weights: str,
    options: dict[str, str],
    limit: float,
    make: Make,
    tiny_llama: tiny.TinyLlama,
    float_adapter: Path,
) -> None:
    ids, out = exported.tokens(), make(mode, weights, **options)
    truth = exported.peft_logits(tiny_llama.fp32, float_adapter, ids)
    found = exported.logits(out, ids, adapter_of(out) if mode == "branch" else None)
    assert exported.divergence(truth, found) < limit


def test_int8_projections_cost_the_delta_next_to_nothing(
    make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path
) -> None:
    ids, out = exported.tokens(), make("branch", "fp32", projections="int8")
    truth = exported.peft_logits(tiny_llama.fp32, float_adapter, ids)
    effect = exported.divergence(
        truth, exported.peft_logits(tiny_llama.fp32, float_adapter, ids, active=False)
    )
    assert exported.divergence(truth, exported.logits(out, ids, adapter_of(out))) < 1e-3 * effect


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_bytes_are_the_checkpoints(
    kind: str, make: Make, tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    base = getattr(tiny_llama, kind)
    out = make("branch", kind, base, tiny_adapter)
    raw = load_file(base / "model.safetensors")
    packs: dict[str, tuple[str, ...]] = {
        "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    }
    packs |= {"attn.o_proj": ("self_attn.o_proj",)}
    packs |= {f"mlp.{name}": (f"mlp.{name}",) for name in ("gate_proj", "up_proj", "down_proj")}
    for layer in range(2):
        for site, modules in packs.items():
            found = exported.data(out, f"model.layers.{layer}.{site}.weight.{kind}")
            stored = [raw[f"model.layers.{layer}.{module}.weight"].reshape(-1) for module in modules]
            np.testing.assert_array_equal(found, np.concatenate(stored))


def test_nf4_branch_is_the_model_as_trained(
    make: Make, tiny_llama: tiny.TinyLlama, tiny_adapter: Path
) -> None:
    """The truth: bitsandbytes' own dequantization of every linear, under PEFT's own layers."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    model = tiny.load(tiny_llama.nf4)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):  # none has run yet: its bytes are the checkpoint's
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            state = module.weight.quant_state
            # As one row: with blocks that run over row ends, bitsandbytes 0.50 gives wrong values on a CPU.
            state.shape = torch.Size([plain.weight.numel()])
            values = dequantize_4bit(module.weight.data, state).float()
            plain.weight.data = values.reshape(plain.weight.shape)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    ids, out = exported.tokens(), make("branch", "nf4", tiny_llama.nf4, tiny_adapter)
    with torch.no_grad():
        wrapped = PeftModel.from_pretrained(model, tiny_adapter).eval()
        truth = wrapped(torch.from_numpy(ids[None])).logits[0].numpy()
    found = exported.logits(out, ids, adapter_of(out))
    assert exported.error(found, truth) < 1e-5
    assert exported.divergence(truth, found) < 1e-9


def test_an_int8_base_keeps_its_codes(make: Make, tiny_llama: tiny.TinyLlama, tiny_adapter: Path) -> None:
    out = make("branch", "same", tiny_llama.int8, tiny_adapter)
    raw = load_file(tiny_llama.int8 / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    found = exported.data(out, "model.layers.1.mlp.down_proj.weight.int8").reshape(raw.shape)
    np.testing.assert_array_equal(found.astype(np.int16) - 128, raw)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_inspect_tells_the_bytes_that_projections_take(
    dtype: str, make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path
) -> None:
    import onnx

    out = make("branch", "fp32", projections=dtype)
    places = (place for name, place in exported.ranges(out).items() if name.startswith(("vera.A", "vera.B")))
    stored = {byte for start, length, _ in places for byte in range(start, start + length)}
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    # A few scales lie in the graph itself.
    inside = sum(
        len(one.raw_data) for one in graph.initializer if one.name in ("vera.A.scales", "vera.B.scales")
    )
    told = inspect_folder(float_adapter, tiny_llama.fp32).cost
    assert told is not None and told.projections is not None
    assert told.projections[dtype] == len(stored) + inside


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("int8", 1)])
def test_projections_are_stored_once(dtype: str, width: int, make: Make) -> None:
    out = make("branch", "fp32", projections=dtype)
    kept = [
        (start, start + length)
        for name, (start, length, _) in exported.ranges(out).items()
        if name.startswith(("vera.A", "vera.B")) and ".scales" not in name
    ]
    taken: set[int] = set()
    for start, stop in kept:
        taken.update(range(start, stop))
    rank, widest_in, widest_out = 8, 160, 160
    # int8 rows are padded to whole blocks, of 128 columns of A and of 32 of B.
    padded = rank * 256 + widest_out * 32
    assert len(taken) == (rank * (widest_in + widest_out) * width if width == 4 else padded)


def test_vectors_default_to_zeros_and_share_them(make: Make) -> None:
    out = make("branch", "fp32")
    vectors = {
        name: at for name, at in exported.ranges(out).items() if name.endswith((".lambda_b", ".lambda_d"))
    }
    assert sorted(vectors) == ["vera.lambda_b", "vera.lambda_d"]
    assert len({start for start, _, _ in vectors.values()}) == 1
    assert not any(exported.data(out, name).any() for name in vectors)


def test_tied_embeddings_are_stored_once_when_quantized(make: Make) -> None:
    at = exported.ranges(make("merged", "int8"))
    assert at["lm_head.weight.int8"][:2] == at["lm_head.weight.int8.rows"][:2]
    assert not any(name.startswith("model.embed_tokens") for name in at)


@pytest.mark.parametrize("head", ["fp32", "fp16"])
def test_tied_embeddings_in_floats_are_stored_once_and_turned_by_no_node(
    tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path: Path, head: str
) -> None:
    import onnx

    options = {"head": head}
    made = target.export(tiny_llama.fp32, [(float_adapter, 1.0)], tmp_path / "out", options=options)
    graph = onnx.load(made.model, load_external_data=False).graph
    tables = [one.name for one in graph.initializer if tiny.VOCABULARY in one.dims]
    assert [list(one.dims) for one in graph.initializer if one.name in tables] == [[tiny.VOCABULARY, 64]]
    assert not any(node.op_type == "Transpose" for node in graph.node)
    casts = {name for node in graph.node if node.op_type == "Cast" for name in node.output}
    readers = [node.op_type for node in graph.node if {*tables, *casts} & {*node.input}]
    assert [op for op in readers if op in ("Gather", "FusedMatMul")] == ["Gather", "FusedMatMul"]
    assert bundle.read(made.folder).requires == {"onnxruntime": "1.22"}


@pytest.mark.parametrize(("asked", "taken"), [(None, 32), ("16", 16), ("64", 64), ("256", 64)])
def test_the_head_has_the_blocks_of_the_linears_where_they_divide_it(
    tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path: Path, asked: str | None, taken: int
) -> None:
    import onnx

    options = {} if asked is None else {"block": asked}
    one = [(float_adapter, 1.0)]
    made = target.export(tiny_llama.fp32, one, tmp_path / "out", weights="int4", options=options)
    nodes = onnx.load(made.model, load_external_data=False).graph.node
    ends = [node for node in nodes if "lm_head" in node.name or node.op_type == "GatherBlockQuantized"]
    sizes = [attribute.i for node in ends for attribute in node.attribute if attribute.name == "block_size"]
    assert sizes == [taken, taken]
    assert bundle.read(made.folder).requires == {"onnxruntime": "1.23"}


def test_layers_that_read_the_same_input_share_one_product(make: Make) -> None:
    import onnx

    graph = onnx.load(make("branch", "fp32") / "onnx" / "model.onnx", load_external_data=False).graph
    downs = [node.name for node in graph.node if "/vera/A/" in node.name]
    assert len(downs) == 2 * 4  # for qkv, o, gate and up, down of two layers


def test_two_exports_are_the_same_bytes(
    make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path: Path
) -> None:
    first = make("branch", "int8")
    again = tmp_path / "elsewhere" / "again"
    target.export(tiny_llama.fp32, [(float_adapter, 1.0)], again, mode="branch", weights="int8")
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_nothing_names_the_build_machine(make: Make, tiny_llama: tiny.TinyLlama) -> None:
    out = make("branch", "int8")
    for path in out.rglob("*"):
        if path.is_file():
            assert str(tiny_llama.root).encode() not in path.read_bytes(), path
            assert b"/.work-" not in path.read_bytes(), path


def test_the_folder_is_laid_out_as_runtimes_expect(make: Make) -> None:
    import onnx

    out = make("branch", "int8")
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    caches = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    assert len(caches) == 4
    assert all(value.type.tensor_type.shape.dim[3].dim_value == 16 for value in caches)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["vera_edge.mode"] == "branch" and "onnxruntime-genai=" in told["vera_edge.tools"]
    manifest = bundle.verify(out)
    assert manifest.default_adapter == "default"
    assert manifest.adapters["default"]["file"] == "adapters/default.onnx_adapter"


@pytest.mark.parametrize(
    ("mode", "weights"), [("merged", "fp32"), ("merged", "int4"), ("branch", "int8"), ("branch", "fp32")]
)
def test_the_graph_is_sound(mode: str, weights: str, make: Make) -> None:
    out = make(mode, weights)
    feeds = exported.decoder_feeds(exported.session(out), exported.tokens())
    assert exported.check(out, feeds) > 20


@pytest.mark.parametrize("vectors", ["fp32", "fp16"])
def test_genai_generates_and_swaps(
    vectors: str, make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path
) -> None:
    import onnxruntime_genai as og

    out = make("branch", "fp32") if vectors == "fp32" else make("branch", "fp32", vectors=vectors)
    model = og.Model(str(out))
    adapters = og.Adapters(model)
    adapters.load(str(adapter_of(out)), "default")
    prompt = exported.tokens(12)

    def generate(name: str | None) -> list[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=24, min_length=24)
        generator = og.Generator(model, params)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(prompt.astype(np.int32)[None])
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)]

    plain, adapted = generate(None), generate("default")
    assert plain != adapted and generate(None) == plain
    for found, active in ((plain, False), (adapted, True)):
        ids = np.array(found, np.int64)
        best = exported.peft_logits(tiny_llama.fp32, float_adapter, ids, active)[11:-1]
        best[:, 2] = -np.inf  # min_length keeps the end token away
        assert best.argmax(-1).tolist() == found[12:]


def test_several_adapters_are_packed_side_by_side(
    make: Make, tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path: Path
) -> None:
    other = tiny.make_adapter(
        tiny_llama.fp32,
        tmp_path / "other",
        targets=["q_proj", "down_proj"],
        vectors_seed=9,
        save_projection=True,
    )
    # Fewer targets, other sizes: PEFT would draw other projections, so the graph can't be shared.
    with pytest.raises(MismatchError, match="projections"):
        target.export(tiny_llama.fp32, [(float_adapter, 1.0), (other, 0.5)], tmp_path / "out", mode="branch")
    second = tiny.make_adapter(tiny_llama.fp32, tmp_path / "second", vectors_seed=9)
    result = target.export(
        tiny_llama.fp32, [(float_adapter, 1.0), (second, 0.5)], tmp_path / "out", mode="branch"
    )
    assert sorted(result.adapters) == ["default", "second"]
    for name, match in (
        ("none", "one asks for the base alone"),
        ("default", "two adapters are called default"),
    ):
        pair = [(float_adapter, 1.0), (Path(shutil.copytree(second, tmp_path / name)), 1.0)]
        refused(PlanError, match, tmp_path / "refused", tiny_llama.fp32, pair, mode="branch")
    ids = exported.tokens()
    for name, source in (("default", float_adapter), ("second", second)):
        truth = exported.peft_logits(tiny_llama.fp32, source, ids)
        found = exported.logits(tmp_path / "out", ids, result.adapters[name])
        assert (exported.error(found, truth) < 1e-5) == (name == "default")  # the second is at half strength


@pytest.mark.parametrize(("vectors", "limit"), [("fp32", 1e-5), ("fp16", 1e-3)])
def test_each_row_of_a_batch_runs_its_own_adapter(
    vectors: str, limit: float, tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path: Path
) -> None:
    second = tiny.make_adapter(tiny_llama.fp32, tmp_path / "second", vectors_seed=9)
    adapters = [(float_adapter, 1.0), (second, 1.0)]
    result = target.export(
        tiny_llama.fp32, adapters, tmp_path / "out", mode="branch", options={"vectors": vectors}
    )
    ids = np.stack([exported.tokens(seed=seed) for seed in (1, 2, 3)])
    rows = [result.adapters[name] for name in ("default", "second", "default")]
    found = exported.batch_logits(result.folder, ids, rows)
    for row, source in enumerate((float_adapter, second, float_adapter)):
        truth = exported.peft_logits(tiny_llama.fp32, source, ids[row])
        assert exported.error(found[row], truth) < limit


def test_an_adapter_on_some_of_qkv(make: Make, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "qv", targets=["q_proj", "v_proj"])
    ids, out = exported.tokens(), make("branch", "fp32", adapter=adapter)
    truth = exported.peft_logits(tiny_llama.fp32, adapter, ids)
    assert exported.error(exported.logits(out, ids, adapter_of(out)), truth) < 1e-5


FAMILIES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "llama with biases": ("Llama", list(tiny.LLAMA_LINEARS), {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", list(tiny.LLAMA_LINEARS), {}),
    "qwen2, biases on q, k, v": ("Qwen2", list(tiny.LLAMA_LINEARS), {}),
    "qwen3, norms on q and k": ("Qwen3", list(tiny.LLAMA_LINEARS), {"head_dim": 16}),
    # The checkpoint packs qkv and gate_up; the builder takes gate and up apart, half a lambda_b for each.
    "phi3": ("Phi3", ["qkv_proj", "gate_up_proj"], {"original_max_position_embeddings": 256}),
    "gemma2": ("Gemma2", list(tiny.LLAMA_LINEARS), {"head_dim": 16, "query_pre_attn_scalar": 16}),
    # Six layers: the sixth reads all of the text and has a rotary embedding of its own.
    "gemma3": (
        "Gemma3",
        list(tiny.LLAMA_LINEARS),
        {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window": 20},
    ),
    "smollm3": ("SmolLM3", list(tiny.LLAMA_LINEARS), {}),
    "llama with an adapted head": ("Llama", ["q_proj", "k_proj", "v_proj", "lm_head"], {}),
}


def family_base(family: str, folder: Path) -> tuple[Path, Path]:
    """A tiny random model of a family, and a VeRA adapter for it, both in `folder`."""
    import torch
    import transformers

    name, targets, options = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(3)
    cls = getattr(transformers, f"{name}ForCausalLM")
    model = cls(cls.config_class(**(sizes | options)))
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    base = tiny.save(model, folder / "base")
    return base, tiny.make_adapter(base, folder / "adapter", targets=targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    (base, adapter), ids = family_base(family, tmp_path), exported.tokens()
    result = target.export(base, [(adapter, 1.0)], tmp_path / "out", mode="branch")
    found = exported.logits(result.folder, ids, result.adapters["default"])
    truth = exported.peft_logits(base, adapter, ids)
    assert exported.error(found, truth) < 1e-5
    assert exported.error(exported.logits(result.folder, ids), truth) > 0.01


@pytest.mark.parametrize("mode", ["merged", "branch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_integers_whose_products_are_joined(family: str, mode: str, tmp_path: Path) -> None:
    (base, adapter), ids = family_base(family, tmp_path), exported.tokens()
    result = target.export(base, [(adapter, 1.0)], tmp_path / "out", mode=mode, weights="int8")
    truth = exported.peft_logits(base, adapter, ids)
    found = exported.error(exported.logits(result.folder, ids, result.adapters.get("default")), truth)
    lost = exported.error(exported.peft_logits(base, adapter, ids, active=False), truth)
    assert found < 0.06 and found < lost / 4  # docs/agreement.md has each one's
    exported.assert_same_in_parts(result.folder, ids, ids[:7])


def refused(
    error: type[VeraEdgeError],
    match: str,
    out: Path,
    base: Path,
    adapters: list[tuple[Path, float]],
    **options: Any,
) -> None:
    with pytest.raises(error, match=match) as caught:
        target.export(base, adapters, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not list(out.parent.glob(".*"))


def test_refusals_leave_nothing_behind(
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    float_adapter: Path,
    tiny_gpt2: Path,
    tiny_gpt2_adapter: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    one = [(float_adapter, 1.0)]
    refused(TargetError, "GPT2LMHeadModel", out, tiny_gpt2, [(tiny_gpt2_adapter, 1.0)])
    refused(
        PlanError,
        "projections can't be stored as 'int3'",
        out,
        tiny_llama.fp32,
        one,
        mode="branch",
        options={"projections": "int3"},
    )
    refused(PlanError, "takes no option 'blocks'", out, tiny_llama.fp32, one, options={"blocks": "32"})
    for option, value in (("projections", "int8"), ("accuracy_level", "0")):
        match = "holds no projections" if option == "projections" else "accuracy level is for"
        refused(PlanError, match, out, tiny_llama.fp32, one, options={option: value})
    int4 = {"weights": "int4"}
    for block, match in (("48", "block of 48 inputs can't run; choose from 16"), ("x", "number of inputs")):
        refused(PlanError, match, out, tiny_llama.fp32, one, options={"block": block}, **int4)
    refused(PlanError, "only weights that are quantized", out, tiny_llama.fp32, one, options={"block": "64"})
    refused(TargetError, "no export target is called 'tflite'", out, tiny_llama.fp32, one, target="tflite")
    refused(PlanError, "bf8", out, tiny_llama.fp32, one, weights="bf8")
    refused(PlanError, "at least one adapter", out, tiny_llama.fp32, [])
    (out / "kept").mkdir(parents=True)
    with pytest.raises(OutputError, match="--force"):
        target.export(tiny_llama.fp32, one, out)
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_the_delta_of_an_adapted_head_is_merged_too(tmp_path: Path) -> None:
    """PEFT saves the head's frozen weight beside its vectors, which must not take the sum's place."""
    (base, adapter), ids = family_base("llama with an adapted head", tmp_path), exported.tokens()
    target.export(base, [(adapter, 1.0)], tmp_path / "out")
    truth = exported.peft_logits(base, adapter, ids)
    assert exported.error(exported.logits(tmp_path / "out", ids), truth) < 1e-5


def test_scaled_rotary_embeddings_of_gemma3_are_carried(tmp_path: Path) -> None:
    """As the larger ones have them: those of the layers that read all of the text, by a factor of 8."""
    base, adapter = family_base("gemma3", tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    (base / "config.json").write_text(json.dumps(config))
    target.export(base, [(adapter, 1.0)], tmp_path / "out")
    ids = exported.tokens()
    truth = exported.peft_logits(base, adapter, ids)
    assert exported.error(exported.logits(tmp_path / "out", ids), truth) < 1e-5


def test_an_encoder_of_a_decoders_model_type_is_refused(
    tiny_llama: tiny.TinyLlama, float_adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(load_file(tiny_llama.fp32 / "model.safetensors"), base / "model.safetensors")
    config = json.loads((tiny_llama.fp32 / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    one = [(float_adapter, 1.0)]
    refused(TargetError, "BertModel, which isn't of model type 'llama'", tmp_path / "out", base, one)


def test_what_a_branch_cannot_carry(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_llama.fp32, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    stored = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in stored if "embed_tokens" in name)
    save_file(stored | {name: stored[name] + 1}, adapter / "adapter_model.safetensors")
    refused(TargetError, "embed_tokens", tmp_path / "out", tiny_llama.fp32, [(adapter, 1.0)], mode="branch")


def test_a_block_and_an_accuracy_level_reach_every_product(make: Make) -> None:
    import onnx

    out = make("branch", "int4", block="16", symmetric="true", accuracy_level="0")
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    told = [{one.name: one.i for one in node.attribute} for node in products]
    assert {one["accuracy_level"] for one in told} == {0}
    linears = [
        (node, one)
        for node, one in zip(products, told, strict=True)
        if "/vera/" not in node.name and "lm_head" not in node.name
    ]
    assert {(one["bits"], one["block_size"], len(node.input)) for node, one in linears} == {(4, 16, 3)}
    plan = bundle.read(out).plan
    assert plan is not None and plan["steps"][0]["options"] == {"block": 16, "symmetric": True}
