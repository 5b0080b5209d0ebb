"""`vera-edge drift` through the command line: tiny models for every path, the real one for the numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.prepare_demo import Demo
from tests import exported, tiny, tiny_bundle
from tests.conftest import Cli
from vera_edge.adapters import reading as adapters
from vera_edge.adapters.vera import vectors_of
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.measuring import opened_candidate
from vera_edge.reference.model import TorchReference
from vera_edge.trained import provenance

torch.set_num_threads(1)
QUICK = ("--tokens", 512, "--window", 32)


def merge_by_numpy(base: Path, adapter_path: Path, out: Path, shape_of: Path) -> Path:
    """The exactly merged model in float32, made without vera-edge's merge. `shape_of`: a dense sibling."""
    checkpoint, adapter = Checkpoint.open(base), adapters.read(adapter_path)
    projections = provenance.resolve(adapter, checkpoint).projections
    model = tiny.load(shape_of)
    for module, pair in vectors_of(adapter).items():
        weight = checkpoint.dequantize(module)
        delta = (pair.lambda_b[:, None] * projections.b[: weight.shape[0]]) @ (
            pair.lambda_d[:, None] * projections.a[:, : weight.shape[1]]
        )
        model.get_submodule(module).weight.data = torch.from_numpy(weight + delta)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, out / name)
    return out


@pytest.fixture(scope="module")
def merged(tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "fp32"
    return merge_by_numpy(tiny_llama.nf4, tiny_adapter, out, tiny_llama.fp32)


def test_an_exact_merge_is_faithful_and_the_base_is_lost(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, merged: Path
) -> None:
    kept = cli("drift", tiny_adapter, merged, "--base", tiny_llama.nf4, *QUICK, "--json")
    assert kept.exit_code == 0, kept.stderr
    report = json.loads(kept.stdout)
    assert report["verdict"]["level"] == "faithful" and report["passed"]
    assert report["fidelity"]["kl"]["mean"]["value"] < 1e-9 < report["effect"]["kl"]["mean"]["value"]
    assert report["retained"]["value"] > 0.999999
    assert report["fidelity"]["same_top1"]["value"] > 0.999
    lost = cli("drift", tiny_adapter, tiny_llama.nf4, "--base", tiny_llama.nf4, *QUICK, "--json")
    assert lost.exit_code == 3
    report = json.loads(lost.stdout)
    assert report["verdict"]["level"] == "lost"
    assert report["fidelity"]["kl"]["mean"] == report["effect"]["kl"]["mean"]
    assert "min_retained (broken)" in lost.stderr


def test_several_artefacts_are_measured_as_each_alone(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same reports, of one run of the reference; a lost one fails all, and the sentence names it."""
    runs: list[int] = []
    together = TorchReference.logits_together

    def counted(views: Sequence[TorchReference], *rest: Any) -> Iterator[tuple[Float32, ...]]:
        runs.append(len(views))
        return together(views, *rest)

    monkeypatch.setattr(TorchReference, "logits_together", staticmethod(counted))
    both = cli("drift", tiny_adapter, merged, tiny_llama.nf4, "--base", tiny_llama.nf4, *QUICK, "--json")
    assert both.exit_code == 3, both.stderr
    assert runs == [3, 1, 1]  # adapter on, off and in bfloat16; then the artefacts
    assert f"not kept for {tiny_llama.nf4}: min_retained (broken)" in both.stderr
    alone = [
        cli("drift", tiny_adapter, one, "--base", tiny_llama.nf4, *QUICK, "--json")
        for one in (merged, tiny_llama.nf4)
    ]
    assert json.loads(both.stdout) == [json.loads(one.stdout) for one in alone]
    shown = cli("drift", tiny_adapter, merged, tiny_llama.nf4, "--base", tiny_llama.nf4, *QUICK)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert any(line[:1] == [str(merged)] and line[-1] == "faithful" for line in lines)
    assert any(line[:1] == [str(tiny_llama.nf4)] and line[-1] == "lost" for line in lines)


@pytest.mark.parametrize(
    ("artefacts", "words", "said"),
    [
        (2, ("--report", "out.html"), "--report is for one artefact"),
        (2, ("--by-layer",), "--by-layer is for one artefact"),
        (1, ("--engine", "cloud"), "engine 'cloud' isn't known"),
        (1, ("--ray-address", "x:1"), "it needs --engine ray"),
        ("twice", (), "is given more than once"),
        ("missing", (), "nowhere"),
    ],
)
def test_what_several_artefacts_cannot_have(
    cli: Cli,
    tiny_adapter: Path,
    tiny_llama: tiny.TinyLlama,
    merged: Path,
    artefacts: Any,
    words: Any,
    said: str,
) -> None:
    given: dict[Any, list[Path]] = {
        1: [merged],
        2: [merged, tiny_llama.nf4],
        "twice": [merged, merged],
        "missing": [merged, Path("nowhere")],
    }
    refused = cli("drift", tiny_adapter, *given[artefacts], "--base", tiny_llama.nf4, *words)
    assert refused.exit_code == 2 and said in refused.stderr and not refused.stdout


def test_every_output_of_one_run(cli: Cli, tiny_adapter: Path, merged: Path, tmp_path: Path) -> None:
    """The base is found through the adapter's config; limits, report, JUnit, plots, and the printed text."""
    limits = tmp_path / "drift.toml"
    limits.write_text("[limits]\nmax_kl = 1e-6\nmin_top1 = 0.99\n")
    files = [
        "--report",
        tmp_path / "out.html",
        "--junit",
        tmp_path / "out.xml",
        "--plots",
        tmp_path / "plots",
    ]
    found = cli(
        "drift", tiny_adapter, merged, *QUICK, "--by-layer", "--limits", limits, "--max-flips", 0.5, *files
    )
    assert found.exit_code == 0, found.stderr
    for words in ("fidelity", "effect", "noise", "mean KL, nats", "retained effect", "faithful", "kept"):
        assert words in found.stdout
    suites = ET.parse(tmp_path / "out.xml").getroot()
    names = {case.get("name") for case in suites.iter("testcase")}
    assert names == {"measured", "max_kl", "min_top1", "max_flips", "min_retained"}
    page = (tmp_path / "out.html").read_text()
    assert "The same prompts, continued by both" in page and "The layers that drift most" in page
    assert "32 of 32 tokens the same" in page
    assert {file.name for file in (tmp_path / "plots").iterdir()} >= {"kl_histogram.png", "layers.png"}


def test_a_release_is_held_to_its_baseline(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, merged: Path, tmp_path: Path
) -> None:
    baseline = tmp_path / "baseline.json"
    first = cli("drift", tiny_adapter, merged, *QUICK, "--json")
    baseline.write_text(first.stdout)
    again = cli("drift", tiny_adapter, merged, *QUICK, "--baseline", baseline)
    assert again.exit_code == 0, again.stderr
    words = (
        "--baseline",
        baseline,
        "--min-retained",
        -9,
        "--beside",
        baseline,
        "--report",
        tmp_path / "r.html",
    )
    worse = cli("drift", tiny_adapter, tiny_llama.nf4, *QUICK, *words)
    assert worse.exit_code == 3 and "baseline_kl (broken)" in worse.stderr
    assert "Size against drift" in (tmp_path / "r.html").read_text()


def test_a_base_folder_with_a_weighted_adapter_is_a_reference_too(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, merged: Path
) -> None:
    whole = cli("drift", tiny_llama.nf4, merged, "--adapter", tiny_adapter, *QUICK, "--json")
    assert whole.exit_code == 0 and json.loads(whole.stdout)["retained"]["value"] > 0.9999
    half = cli("drift", tiny_llama.nf4, merged, "--adapter", f"{tiny_adapter}=0.5", *QUICK, "--json")
    assert json.loads(half.stdout)["fidelity"]["kl"]["mean"]["value"] > 1e-4


def test_a_dense_base_against_its_16_bit_copy_has_no_effect_to_retain(
    cli: Cli, tiny_llama: tiny.TinyLlama
) -> None:
    found = cli("drift", tiny_llama.fp32, tiny_llama.bf16, *QUICK, "--json")
    assert found.exit_code == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["effect"] is None and report["retained"] is None and report["outcomes"] == []
    assert 0 < report["fidelity"]["kl"]["mean"]["value"] < 1e-3
    undecided = cli("drift", tiny_llama.fp32, tiny_llama.bf16, *QUICK, "--min-retained", 0.5)
    assert undecided.exit_code == 3 and "min_retained (undecided)" in undecided.stderr


def test_a_bitsandbytes_artefact_runs_in_its_own_kernels(
    cli: Cli, tiny_llama: tiny.TinyLlama, tmp_path: Path
) -> None:
    """Rows of whole blocks run in bitsandbytes; others, which its CPU kernels misread, on exact values."""
    odd = cli("drift", tiny_llama.nf4, tiny_llama.nf4, *QUICK, "--json")
    report = json.loads(odd.stdout)
    assert report["fidelity"]["kl"]["maximum"] == 0
    assert any("whole blocks" in note for note in report["notes"])
    options = tiny.four_bit("nf4", llm_int8_skip_modules=["down_proj", "lm_head"])
    base = tiny.quantize(tiny_llama.fp32, tmp_path / "nf4", **options)
    own = json.loads(cli("drift", base, base, *QUICK, "--json").stdout)
    assert "bitsandbytes kernels" in own["candidate"]["kind"]
    # Whether those kernels round depends on the processor, so what they give is the truth.
    assert own["fidelity"]["kl"]["mean"]["value"] < 0.01
    ids = exported.tokens(32, tiny.VOCABULARY)
    with torch.no_grad():
        theirs = tiny.load(base).eval()(torch.from_numpy(ids[None])).logits[0].float().numpy()
    ours = opened_candidate.open_candidate(base).runner.logits(ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
    exact = json.loads(cli("drift", base, base, *QUICK, "--exact", "--json").stdout)
    assert exact["fidelity"]["kl"]["maximum"] == 0


@pytest.fixture(scope="module")
def bundles(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float branch export and a merged one of the untouched base, by ONNX Runtime GenAI's builder."""
    root = tmp_path_factory.mktemp("bundles")
    branch = tiny_bundle.branch(tiny_llama.fp32, root / "branch")
    return branch, tiny_bundle.merged(tiny_llama.fp32, root / "merged")


def test_exports_are_compared_without_torch(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    """A branch export with its adapter is a reference; a merged export of the bare base has lost it all."""
    branch, merged = bundles
    code = (
        "import sys, runpy\n"
        "from vera_edge.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    heavy = ('torch', 'transformers', 'onnx', 'peft')\n"
        "    print('LOADED', [name for name in heavy if name in sys.modules])"
    )
    words = ["drift", str(branch), str(merged), "--tokens", "512", "--window", "32"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--report", str(tmp_path / "r.html")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 3 and "nothing of its effect" in done.stdout


def test_a_branch_export_is_faithful_to_itself(cli: Cli, bundles: tuple[Path, Path]) -> None:
    found = cli("drift", bundles[0], bundles[0], *QUICK, "--json")
    report = json.loads(found.stdout)
    assert found.exit_code == 0 and report["fidelity"]["kl"]["maximum"] == 0
    assert report["effect"]["kl"]["mean"]["value"] > 1e-3 and report["noise"] is None


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny BERT, a VeRA adapter on it, and the exact merge of the two by PEFT."""
    from peft import PeftModel, VeraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=160, max_position_embeddings=128, initializer_range=0.15,
    )  # fmt: skip
    base = tiny.save(BertModel(config), root / "base")
    settings = VeraConfig(r=8, target_modules=["query", "value"], save_projection=False)
    model = get_peft_model(BertModel.from_pretrained(base), settings)
    tiny.randomize(model, 1.0, 5)
    model.save_pretrained(root / "adapter")
    merged = PeftModel.from_pretrained(BertModel.from_pretrained(base), root / "adapter").merge_and_unload()
    return base, root / "adapter", tiny.save(merged, root / "merged")


def test_an_encoder_is_measured_by_what_it_retrieves(
    cli: Cli, encoder: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, merged = encoder
    kept = cli("drift", adapter, merged, "--base", base, "--json", "--junit", tmp_path / "j.xml")
    assert kept.exit_code == 0, kept.stderr
    report = json.loads(kept.stdout)
    assert report["embeddings"]["cosine"]["value"] > 0.999999
    assert report["embeddings"]["overlap"]["value"] > 0.99 and report["retained"]["value"] > 0.999
    assert report["effect"]["cosine"]["value"] < 0.999 and report["verdict"]["level"] == "faithful"
    assert (tmp_path / "j.xml").is_file()
    lost = cli("drift", adapter, base, "--base", base, "--min-retained", 0.9)
    assert lost.exit_code == 3 and "The adapter is lost" in lost.stdout and "cosine" in lost.stdout
    limits = tmp_path / "drift.toml"
    limits.write_text("[limits]\nmin_cosine = 0.99\nmin_overlap = 0.9\n")
    assert cli("drift", adapter, merged, "--base", base, "--limits", limits).exit_code == 0
    limits.write_text("[limits]\nmax_flips = 0.1\n")
    refused = cli("drift", adapter, merged, "--base", base, "--limits", limits)
    assert refused.exit_code == 2 and "of this model only min_cosine" in refused.stderr
    refused = cli("drift", adapter, merged, "--base", base, "--report", tmp_path / "r.html")
    assert refused.exit_code == 2 and "gives no text" in refused.stderr


def test_of_a_bundle_with_several_adapters_the_references_runs(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    other = tiny.make_adapter(tiny_llama.nf4, tmp_path / "other", vectors_seed=77)
    out = tmp_path / "branch"
    words = ("export", tiny_llama.nf4, tiny_adapter, "--adapter", other, "--mode", "branch")
    assert cli(*words, "--weights", "nf4", "-o", out).exit_code == 0
    stranger = tiny.make_adapter(tiny_llama.nf4, tmp_path / "stranger", vectors_seed=78)
    for adapter, own in ((tiny_adapter, True), (other, True), (stranger, False)):
        done = cli("drift", adapter, out, "--base", tiny_llama.nf4, "--tokens", 512, "--window", 64, "--json")
        report = json.loads(done.stdout)
        assert (report["fidelity"]["kl"]["mean"]["value"] < 1e-6) is own
        assert any("wasn't made with the reference's adapter" in note for note in report["notes"]) is not own


def test_an_artefact_that_nothing_here_can_run_is_measured_on_exact_values(
    cli: Cli, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """GPTQ's own kernels come with gptqmodel, which isn't among what the tests install."""
    merged = tmp_path / "gptq"
    words = (tiny_llama.nf4, tiny_adapter, "--to", "gptq", "--block-size", 32, "--method", "rtn")
    assert cli("merge", *words, "-o", merged).exit_code == 0
    measured = ("drift", tiny_adapter, merged, "--base", tiny_llama.nf4, "--tokens", 1024, "--window", 64)
    refused = cli(*measured)
    assert refused.exit_code == 2 and "--exact runs it on exact values" in refused.stderr
    found = json.loads(cli(*measured, "--exact", "--json").stdout)
    assert found["candidate"]["kind"] == "checkpoint, gptq, computed in float32"


def test_an_exported_encoder_is_measured_as_a_merged_one(
    cli: Cli,
    encoder: tuple[Path, Path, Path],
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    base, adapter, _ = encoder
    exact, coarse = tmp_path / "exact", tmp_path / "coarse"
    words = ("export", base, adapter, "--mode", "branch", "--weights")
    assert cli(*words, "fp32", "-o", exact).exit_code == 0
    assert cli(*words, "int4", "--method", "rtn", "-o", coarse).exit_code == 0
    found = [
        json.loads(cli("drift", adapter, out, "--base", base, "--json").stdout) for out in (exact, coarse)
    ]
    cosines = [report["embeddings"]["cosine"]["value"] for report in found]
    assert cosines[0] > 0.999999 and 0.9 < cosines[1] < 0.9999
    assert found[0]["retained"]["value"] > 0.999
    refused = cli("drift", tiny_adapter, exact, "--base", tiny_llama.nf4)
    assert refused.exit_code == 2 and "gives no text" in refused.stderr
    refused = cli("drift", exact, coarse)
    assert refused.exit_code == 2 and "can't be the reference" in refused.stderr


def test_a_classifier_is_measured_by_its_answers(cli: Cli, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=160, num_labels=4, initializer_range=0.15,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    base = tiny.save(model, tmp_path / "base")
    model.classifier.weight.data *= 1.02
    moved = tiny.save(model, tmp_path / "moved")
    found = json.loads(cli("drift", base, moved, "--json").stdout)
    assert found["classes"]["agreement"]["value"] > 0.9 and found["effect"] is None
    assert 0 < found["classes"]["kl"]["value"] < 0.1


def _with_nan(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _with_vocabulary(source: Path, out: Path, size: int) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:size].contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"vocab_size": size}
    (out / "config.json").write_text(json.dumps(config))
    return out


def _bad(case: str, tmp: Path, base: Path, adapter: Path, merged: Path, bundle: Path) -> list[Any]:
    """The words of a command that must be refused."""
    text = tmp / "text.txt"
    if case in ("empty", "tiny", "binary"):
        text.write_bytes({"empty": b"", "tiny": b"few words", "binary": b"\xff\xfe\x00"}[case])
        return [adapter, merged, "--data", text]
    if case == "nan":
        return [adapter, _with_nan(merged, tmp / "nan")]
    if case == "vocabulary":
        return [adapter, _with_vocabulary(merged, tmp / "other", 380)]
    if case == "tokenizer":
        shutil.copytree(merged, tmp / "other")
        from tokenizers import Tokenizer, models

        Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp / "other" / "tokenizer.json"))
        return [adapter, tmp / "other"]
    if case == "limits of encoders":
        (tmp / "drift.toml").write_text("[limits]\nmax_relative_error = 1\n")
        return [adapter, merged, "--limits", tmp / "drift.toml"]
    if case == "limits":
        (tmp / "drift.toml").write_text("[limits]\nmax_klx = 1\n")
        return [adapter, merged, "--limits", tmp / "drift.toml"]
    commands: dict[str, list[Any]] = {
        "no reference": [tmp / "none", merged],
        "no artefact": [adapter, tmp / "none"],
        "adapter as artefact": [adapter, adapter],
        "merged export as reference": [bundle, merged],
        "no such data": [adapter, merged, "--data", tmp / "none.txt"],
        "window": [adapter, merged, "--window", 4],
        "context": [adapter, merged, "--window", 300],
        "baseline": [adapter, merged, "--baseline", base / "config.json"],
        "report is a folder": [adapter, merged, "--report", tmp],
        "by layer of an export": [base, bundle, "--by-layer"],
    }
    return commands[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty", "holds no text"),
        ("tiny", "too few to measure on"),
        ("binary", "isn't UTF-8 text"),
        ("nan", "logits hold NaN"),
        ("vocabulary", "vocabulary of 384 tokens and the artefact one of 380"),
        ("tokenizer", "split the same text differently"),
        ("limits", "no limit 'max_klx'"),
        ("limits of encoders", "it is measured of encoders"),
        ("no reference", "none isn't a folder"),
        ("no artefact", "none isn't a folder"),
        ("adapter as artefact", "is an adapter, not an artefact"),
        ("merged export as reference", "isn't the model as trained"),
        ("no such data", "none.txt is missing"),
        ("window", "too small"),
        ("context", "longer than the model's context of 256"),
        ("baseline", "isn't a report"),
        ("report is a folder", "give the name of a file"),
        ("by layer of an export", "leave --by-layer out"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    cli: Cli,
    tiny_llama: tiny.TinyLlama,
    tiny_adapter: Path,
    merged: Path,
    bundles: tuple[Path, Path],
    tmp_path: Path,
    case: str,
    message: str,
) -> None:
    words = _bad(case, tmp_path, tiny_llama.nf4, tiny_adapter, merged, bundles[1])
    before = sorted(tmp_path.rglob("*"))
    found = cli("drift", *words, *(() if "--window" in words else QUICK), "--junit", tmp_path / "j.xml")
    assert found.exit_code == 2
    assert message in found.stderr and found.stderr.startswith("vera-edge: ")
    assert found.stderr.count("\n") == 1 and found.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_does_not_find_its_base_asks_for_it(
    cli: Cli, tiny_adapter: Path, merged: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "hub/name"
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = cli("drift", folder, merged, *QUICK)
    assert found.exit_code == 2 and "hub/name, which isn't a folder here; give --base" in found.stderr


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_adapter_on_its_real_base(cli: Cli, demo: Demo, tmp_path: Path) -> None:
    """SmolLM2: the exact merge keeps the adapter, the untouched base has lost it. The reference runs once."""
    exact = merge_by_numpy(demo.base, demo.adapter, tmp_path / "exact", demo.float_base)
    words = ("--base", demo.base, "--data", demo.eval_text, "--tokens", 512, "--window", 64, "--json")
    both = cli("drift", demo.adapter, exact, demo.base, *words, "--exact")
    assert both.exit_code == 3, both.stderr
    report, lost = json.loads(both.stdout)
    assert (
        report["passed"]
        and report["fidelity"]["kl"]["mean"]["value"] < 1e-7
        and report["retained"]["value"] > 0.99999
    )
    # The adapter learned something: it changes what the base says, and says its kind of text better.
    effect = report["effect"]
    assert effect["kl"]["mean"]["low"] > 0.05
    assert effect["perplexity"]["value"] > 1.1 * effect["reference_perplexity"]["value"]
    assert np.isfinite(report["noise"]["kl"]["mean"]["value"])
    assert not lost["passed"] and lost["retained"]["value"] == 0
