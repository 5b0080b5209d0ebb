"""Which projections an adapter was trained with: every row of the table, against the PEFT that made it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import kernels, peft_cases, tiny
from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import regenerate
from vera_edge.adapters.reading import read
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError, MismatchError
from vera_edge.storage.tensors import TensorFolder
from vera_edge.trained import provenance

GOLDEN = Path(__file__).parents[2] / "golden" / "adapters"
HELD = {
    folder: digest
    for record in sorted(GOLDEN.glob("peft-*/held.json"))
    for folder, digest in (
        (record.parent / name, digest) for name, digest in json.loads(record.read_text())["held"].items()
    )
}


def base(llama: tiny.TinyLlama, name: str) -> Checkpoint:
    return Checkpoint.open(peft_cases.base_folder(llama, name))


def unsaved(version: str, case: str) -> Adapter:
    return read(GOLDEN / f"peft-{version}" / f"unsaved-{case}")


@pytest.mark.parametrize("folder", HELD, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_finds_what_every_peft_held(folder: Path, tiny_llama: tiny.TinyLlama) -> None:
    """Adapters of seven PEFT releases; the digest was taken of the buffers in memory."""
    case = peft_cases.CASES[folder.name]
    adapter = read(folder)
    found = provenance.resolve(adapter, base(tiny_llama, case.base))
    assert found.projections.digest == HELD[folder]
    assert found.verified == case.config.get("save_projection", False)
    assert found.from_seed
    assert regenerate(found.spec).digest == HELD[folder]
    assert found.notes == ()


@pytest.mark.parametrize("name", peft_cases.BASES)
def test_finds_what_the_installed_peft_holds(name: str, tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """On every kind of base, projections saved and not: the same spec, and PEFT's buffers bit for bit.

    Not saved, they are taken to come from kernels with fused multiply-add, which torch's for old processors
    lack: then the two differ in last bits.
    """
    specs = []
    for save in (False, True):
        case = peft_cases.Case(name, seed=2**40 + 17, config={"save_projection": save})
        a, b = peft_cases.make(case, tiny_llama, tmp_path / str(save))
        found = provenance.resolve(read(tmp_path / str(save)), base(tiny_llama, name))
        assert found.verified == save
        specs.append(found.spec)
        if save or kernels.torch_fuses():
            assert np.array_equal(found.projections.a.view(np.uint32), a.view(np.uint32))
            assert np.array_equal(found.projections.b.view(np.uint32), b.view(np.uint32))
    assert specs[0] == (specs[1] if kernels.torch_fuses() else dataclasses.replace(specs[1], fused=True))


@pytest.mark.parametrize(
    ("version", "case", "how"),
    [
        ("0.21.2", "fp32", "PEFT leaves them as drawn on a base in float32"),
        ("0.21.2", "bf16", "PEFT rounds them to bfloat16 on a base in bfloat16"),
        ("0.21.2", "int8", "PEFT leaves them as drawn on an LLM.int8 base"),
        (
            "0.21.2",
            "nf4",
            "PEFT of any version leaves them as drawn on a 4-bit base that computes in float32",
        ),
        (
            "0.21.2",
            "nf4-bf16",
            "PEFT 0.21.2 rounds them to bfloat16 on a 4-bit base that computes in bfloat16",
        ),
        ("0.18.1", "nf4-bf16", "PEFT 0.18.1 leaves them as drawn on a 4-bit base stored as uint8 or float32"),
        ("0.17.1", "nf4-bf16", "PEFT before 0.18.1 (it records no version) leaves them as drawn"),
        (
            "0.18.1",
            "nf4-stored-bf16",
            "PEFT 0.18.1 rounds them to bfloat16 on a 4-bit base stored as bfloat16",
        ),
        ("0.21.2", "mixed", "PEFT rounds them to bfloat16 on a base in bfloat16"),
    ],
)
def test_says_how_it_was_found(version: str, case: str, how: str, tiny_llama: tiny.TinyLlama) -> None:
    found = provenance.resolve(unsaved(version, case), base(tiny_llama, case))
    assert found.how.startswith(f"drawn from seed 41; {how}")


@pytest.mark.parametrize("version", ["0.18.2.dev0", "0.19.0.dev0", "0.18.1.dev0@abcdef", "main"])
def test_asks_when_the_version_cannot_tell(version: str, tiny_llama: tiny.TinyLlama) -> None:
    adapter = dataclasses.replace(unsaved("0.19.1", "nf4-bf16"), peft_version=version)
    checkpoint = base(tiny_llama, "nf4-bf16")
    with pytest.raises(
        AdapterError, match="to bfloat16 or to float32; give the dtype with --projection-rounding"
    ):
        provenance.resolve(adapter, checkpoint)
    for asked in ("bf16", "bfloat16"):
        found = provenance.resolve(adapter, checkpoint, asked)
        assert found.spec.rounding == "bfloat16"
        assert found.how == "drawn from seed 41; as asked, rounded to bfloat16"
    # where both rules agree, it doesn't matter
    assert provenance.resolve(adapter, base(tiny_llama, "nf4")).spec.rounding == "float32"


@pytest.mark.parametrize(("version", "rounding"), [("0.19.2.dev0", "bfloat16"), ("0.18.0.dev0", "float32")])
def test_other_development_versions_are_clear(
    version: str, rounding: str, tiny_llama: tiny.TinyLlama
) -> None:
    adapter = dataclasses.replace(unsaved("0.19.1", "nf4-bf16"), peft_version=version)
    assert provenance.resolve(adapter, base(tiny_llama, "nf4-bf16")).spec.rounding == rounding


def test_asks_for_the_base_when_nothing_was_saved() -> None:
    with pytest.raises(AdapterError, match=r"doesn't hold its projections, .*: give --base"):
        provenance.resolve(unsaved("0.21.2", "fp32"))


def test_refuses_an_unknown_dtype(tiny_llama: tiny.TinyLlama) -> None:
    with pytest.raises(AdapterError, match="projection rounding 'int8' isn't known; give the dtype with"):
        provenance.resolve(unsaved("0.21.2", "fp32"), base(tiny_llama, "fp32"), "int8")


def test_refuses_layers_of_two_half_precisions(tiny_llama: tiny.TinyLlama) -> None:
    checkpoint = base(tiny_llama, "bf16")
    linears = dict(checkpoint.linears)
    name = "model.layers.0.mlp.down_proj"
    linears[name] = dataclasses.replace(linears[name], format="fp16")
    with pytest.raises(
        AdapterError, match="layers that PEFT rounds to bfloat16 and others it rounds to float16"
    ):
        provenance.resolve(unsaved("0.21.2", "bf16"), dataclasses.replace(checkpoint, linears=linears))


def as_format(checkpoint: Checkpoint, name: str, **config: Any) -> Checkpoint:
    """The checkpoint as if its linears were stored in another format."""
    linears = {
        module: dataclasses.replace(linear, format=name) for module, linear in checkpoint.linears.items()
    }
    return dataclasses.replace(checkpoint, linears=linears, config={**checkpoint.config, **config})


def test_an_fp8_base_rounds_to_fp8(tiny_llama: tiny.TinyLlama) -> None:
    """PEFT casts the projections to the weights' dtype even where that is an eight-bit float."""
    import torch
    from peft import VeraConfig, get_peft_model

    model = tiny.load(tiny_llama.fp32)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.down_proj):
            weight = linear.weight.data.to(torch.float8_e4m3fn)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    targets = list(peft_cases.TARGETS)
    held = get_peft_model(model, VeraConfig(r=4, projection_prng_key=41, target_modules=targets)).base_model
    found = provenance.resolve(unsaved("0.21.2", "fp32"), as_format(base(tiny_llama, "fp32"), "fp8"))
    assert found.spec.rounding == "float8_e4m3fn"
    assert np.array_equal(found.projections.a, held.vera_A["default"].numpy())
    assert np.array_equal(found.projections.b, held.vera_B["default"].numpy())


@pytest.mark.parametrize(
    ("name", "config", "rounding"),
    [
        ("hqq", {}, "float32"),
        ("gptq", {}, "float32"),
        ("awq", {}, "float32"),
        ("torchao", {"dtype": "bfloat16"}, "bfloat16"),
        ("torchao", {"dtype": None, "torch_dtype": "torch.float16"}, "float16"),
    ],
)
def test_other_quantizers(
    name: str, config: dict[str, Any], rounding: str, tiny_llama: tiny.TinyLlama
) -> None:
    """The rules that PEFT showed where these libraries were installed (see docs/projections.md)."""
    checkpoint = as_format(base(tiny_llama, "fp32"), name, **config)
    assert provenance.resolve(unsaved("0.21.2", "fp32"), checkpoint).spec.rounding == rounding


def test_asks_on_a_torchao_base_without_a_dtype(tiny_llama: tiny.TinyLlama) -> None:
    checkpoint = as_format(base(tiny_llama, "fp32"), "torchao", dtype=None)
    with pytest.raises(AdapterError, match="gives None as its dtype; give the dtype with"):
        provenance.resolve(unsaved("0.21.2", "fp32"), checkpoint)


def test_asks_on_a_format_peft_is_not_known_for(tiny_llama: tiny.TinyLlama) -> None:
    checkpoint = as_format(base(tiny_llama, "fp32"), "unheard-of")
    with pytest.raises(AdapterError, match=r"on a unheard-of base isn't known .*; give the dtype"):
        provenance.resolve(unsaved("0.21.2", "fp32"), checkpoint)


def test_saved_projections_need_no_base() -> None:
    found = provenance.resolve(read(GOLDEN / "peft-0.21.2" / "saved-bf16"))
    assert found.verified
    assert found.how == (
        "the saved projections equal what seed 4294967299 gives, rounded to bfloat16, bit for bit"
    )
    with pytest.raises(
        MismatchError, match="rounded to bfloat16, not to float16; leave --projection-rounding out"
    ):
        provenance.resolve(read(GOLDEN / "peft-0.21.2" / "saved-bf16"), None, "float16")


def with_saved(adapter: Adapter, a: Any, b: Any) -> Adapter:
    return dataclasses.replace(adapter, saved=(a, b))


def test_reads_projections_saved_in_half_precision(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """autocast_adapter_dtype=False keeps everything in the base's dtype, in memory and in the file."""
    import torch
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=4, projection_prng_key=41, target_modules=["k_proj"], save_projection=True)
    model = tiny.load(tiny_llama.bf16, dtype=torch.bfloat16)
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    adapter = read(tmp_path)
    dtypes = {info.dtype for info in TensorFolder.open(tmp_path, "adapter_model").values()}
    assert dtypes == {"BF16"}
    found = provenance.resolve(adapter, Checkpoint.open(tiny_llama.bf16))
    assert found.verified
    assert found.spec.rounding == "bfloat16"


def test_recognises_a_processor_without_fused_multiply_add() -> None:
    adapter = read(GOLDEN / "peft-0.21.2" / "saved-fp32")
    spec = dataclasses.replace(provenance.resolve(adapter).spec, fused=False)
    unfused = regenerate(spec)
    found = provenance.resolve(with_saved(adapter, unfused.a, unfused.b))
    assert found.spec == spec
    assert found.verified
    assert "without fused multiply-add" in found.how


def test_saved_projections_that_no_seed_gives_are_the_truth(tiny_llama: tiny.TinyLlama) -> None:
    adapter = read(GOLDEN / "peft-0.21.2" / "saved-fp32")
    assert adapter.saved is not None
    a, b = (array.copy() for array in adapter.saved)
    a[1, 2] += np.float32(0.5)
    found = provenance.resolve(with_saved(adapter, a, b), base(tiny_llama, "fp32"))
    assert np.array_equal(found.projections.a, a)
    assert not found.verified
    assert not found.from_seed
    assert found.how == (
        "the saved projections are used as they are, for seed 41 doesn't give them: 0.1% of the values "
        "differ from those drawn unrounded, by at most 0.5"
    )
    with pytest.raises(MismatchError, match=r"peft-0.21.2/saved-fp32, the saved projections are used"):
        provenance.verify(with_saved(adapter, a, b))


def test_verify_needs_something_to_verify() -> None:
    with pytest.raises(AdapterError, match="nothing to verify them against; train with save_projection=True"):
        provenance.verify(unsaved("0.21.2", "fp32"))
    assert provenance.verify(read(GOLDEN / "peft-0.21.2" / "saved-fp32")).verified


def test_notes_projections_made_for_another_adapter(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> None:
    """An adapter added second shares the first one's projections, which may be larger than its own layers."""
    from peft import VeraConfig, get_peft_model

    options: dict[str, Any] = {"r": 4, "projection_prng_key": 41, "save_projection": True}
    model = get_peft_model(tiny.load(tiny_llama.fp32), VeraConfig(target_modules=["down_proj"], **options))
    model.add_adapter("second", VeraConfig(target_modules=["k_proj"], **options))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    found = provenance.resolve(read(tmp_path / "second"), base(tiny_llama, "fp32"))
    assert (found.spec.in_max, found.spec.out_max) == (160, 64)
    assert found.verified
    assert len(found.notes) == 1
    assert "made for 160 inputs and 64 outputs, but the adapted layers need 64 and 32" in found.notes[0]


def test_to_dict_is_json(tiny_llama: tiny.TinyLlama) -> None:
    found = provenance.resolve(unsaved("0.21.2", "fp32"), base(tiny_llama, "fp32"))
    record = json.loads(json.dumps(found.to_dict()))
    assert record["spec"] == found.spec.to_dict()
    assert record["digest"] == found.projections.digest
