"""`vera-edge merge` on the trained demo adapter, and on input that's at fault."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scripts.prepare_demo import Demo
from tests import tiny
from tests.conftest import Cli
from tests.exported import divergence
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.reference.model import load_dense


def tokens(demo: Demo) -> torch.Tensor:
    from transformers import AutoTokenizer

    text = demo.eval_text.read_text()[:900]
    found: torch.Tensor = AutoTokenizer.from_pretrained(demo.base)(text, return_tensors="pt")["input_ids"]
    return found[:, :160]


def logits(model: Any, ids: torch.Tensor) -> Float32:
    with torch.no_grad():
        found: Float32 = model.eval()(input_ids=ids).logits.float().numpy()
    return found


@pytest.fixture(scope="module")
def as_trained(demo: Demo) -> Float32:
    """PEFT's unmerged forward in float32 on the NF4 values, as bitsandbytes dequantizes the file's."""
    from peft import PeftModel

    model, state = tiny.load(demo.float_base), load_file(demo.base / "model.safetensors")
    replaced = 0
    for name in state:
        if ".quant_state." not in name:
            continue
        module, _, _ = name.partition(".weight.quant_state")
        prefix = f"{module}.weight."
        parts = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        quant_state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
        values = bnb.dequantize_4bit(state[f"{module}.weight"], quant_state)
        model.get_submodule(module).weight.data = values
        replaced += 1
    assert replaced == 210
    return logits(PeftModel.from_pretrained(model, demo.adapter), tokens(demo))


@pytest.fixture(scope="module")
def merged_fp32(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The merge in a process of its own, which says how much memory it took."""
    out = tmp_path_factory.mktemp("merged") / "fp32"
    code = (
        "import json, re, sys; from pathlib import Path; from vera_edge import merging as merge\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "report = merge.to_folder(base, [(adapter, 1.0)], out, 'fp32')\n"
        # Not ru_maxrss: a child inherits the peak of the process that started it.
        "peak = int(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "print(json.dumps({'peak': peak, 'torch': 'torch' in sys.modules, **report.to_dict()}))\n"
    )
    words = [str(demo.base), str(demo.adapter), str(out)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B")
def test_the_float32_merge_computes_what_peft_does(
    demo: Demo, merged_fp32: tuple[Path, dict[str, Any]], as_trained: Float32
) -> None:
    ids = tokens(demo)
    mine = logits(tiny.load(merged_fp32[0]), ids)
    assert np.abs(mine - as_trained).max() < 1e-4 * np.abs(as_trained).max()
    untouched = logits(tiny.load(demo.float_base), ids)
    assert np.abs(untouched - as_trained).max() > 0.1 * np.abs(as_trained).max()


@pytest.mark.real
def test_the_float32_merge_takes_the_memory_of_a_tensor(merged_fp32: tuple[Path, dict[str, Any]]) -> None:
    """The embedding alone is 113 MB; the output 538 MB. Python, numpy and the projections come on top."""
    out, told = merged_fp32
    assert (out / "model.safetensors").stat().st_size > 538e6
    assert told["peak"] < 0.85 * 538e6
    assert told["torch"] is False
    assert told["merged_layers"] == 210
    assert told["total"]["retained"] == pytest.approx(1.0)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B")
def test_int8_loads_as_a_bitsandbytes_model_and_keeps_the_adapter(
    demo: Demo, cli: Cli, tmp_path: Path, as_trained: Float32
) -> None:
    result = cli("merge", demo.base, demo.adapter, "-o", tmp_path / "int8", "--to", "int8", "--method", "rtn")
    assert result.exit_code == 0, result.stderr
    assert "retained share" in result.stdout
    assert "warning" not in result.stderr
    model = tiny.load(tmp_path / "int8")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    mine = logits(model, tokens(demo))
    # bitsandbytes rounds the activations of LLM.int8 too, so this isn't equality.
    base = logits(load_dense(Checkpoint.open(demo.base)).eval(), tokens(demo))
    assert divergence(as_trained[0], mine[0]) < 0.1 * divergence(as_trained[0], base[0])
    ids = tokens(demo)[:, :20]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 24)


def test_a_drowned_adapter_is_told_with_exit_0(tiny_llama: tiny.TinyLlama, cli: Cli, tmp_path: Path) -> None:
    adapter = tiny.make_adapter(tiny_llama.nf4, tmp_path / "adapter", strength=0.03)
    words = ["merge", tiny_llama.nf4, adapter, "--method", "rtn"]
    result = cli(*words, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "warning: the adapter is drowned by rounding to nf4" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "drowned layers" in result.stdout
    result = cli(*words, "-o", tmp_path / "json", "--json")
    told = json.loads(result.stdout)
    assert told["warning"] in result.stderr
    assert told["drowned_layers"] > 7
    assert told["layers"]["model.layers.0.mlp.up_proj"]["retained"] < 0.5


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
) -> None:
    words = ["merge", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "out", "--to", "bf16", "--dry-run"]
    result = cli(*words)
    assert result.exit_code == 0
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "writes" in result.stdout
    assert "time" in result.stdout
    plan = json.loads(cli(*words, "--json").stdout)
    assert {step["result"] for step in plan["steps"]} == {"bf16"}
    assert not list(tmp_path.iterdir())


def test_where_it_runs_is_told_on_the_command_line(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
) -> None:
    words = ["merge", tiny_llama.nf4, tiny_adapter, "--to", "bf16"]
    assert cli(*words, "-o", tmp_path / "one").exit_code == 0
    more = ["--workers", "2", "--max-memory", "1GB"]
    result = cli(*words, "-o", tmp_path / "two", *more)
    assert result.exit_code == 0, result.stderr
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    for wrong, said in {
        ("--max-memory", "30MB"): "--max-memory allows 30 MB, and model",
        ("--max-memory", "much"): "isn't a size",
        ("--workers", "0"): "0 workers can't work",
        ("--engine", "dask"): "engine 'dask' isn't known",
    }.items():
        result = cli(*words, "-o", tmp_path / "three", *wrong)
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_weights_and_further_adapters(tiny_llama: tiny.TinyLlama, cli: Cli, tmp_path: Path) -> None:
    first = tiny.make_adapter(tiny_llama.nf4, tmp_path / "first", vectors_seed=1)
    second = tiny.make_adapter(tiny_llama.nf4, tmp_path / "a=b", vectors_seed=2)
    words = ["--weight", "0.5", "--adapter", f"{second}=-0.25", "--adapter", second]
    result = cli("merge", tiny_llama.nf4, first, "-o", tmp_path / "out", "--to", "fp32", "--json", *words)
    assert result.exit_code == 0, result.stderr
    assert [entry["weight"] for entry in json.loads(result.stdout)["adapters"]] == [0.5, -0.25, 1.0]


def test_every_adapter_by_itself(tiny_llama: tiny.TinyLlama, cli: Cli, tmp_path: Path) -> None:
    folders = [tiny.make_adapter(tiny_llama.nf4, tmp_path / name, strength=0.03) for name in ("a", "b")]
    words = ["merge", tiny_llama.nf4, *folders, "--each", "--method", "rtn"]
    result = cli(*words, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert [Path(one["folder"]).name for one in json.loads(result.stdout)["models"]] == ["a", "b"]
    assert [line[:12] for line in result.stderr.splitlines()] == ["warning: a: ", "warning: b: "]
    for name in ("a", "b"):
        assert cli("merge", tiny_llama.nf4, tmp_path / name, "-o", tmp_path / "one", "--force", *words[-2:])
        one, both = (tmp_path / where / "model.safetensors" for where in ("one", f"out/{name}"))
        assert one.read_bytes() == both.read_bytes()
    plans = json.loads(cli(*words, "-o", tmp_path / "dry", "--dry-run", "--json").stdout)["plans"]
    assert list(plans) == ["a", "b"]


class TestRefused:
    """One sentence on stderr, exit 2, and nothing written."""

    def refused(self, cli: Cli, out: Path, *words: object) -> str:
        before = set(out.parent.iterdir())
        result = cli("merge", *words, "-o", out)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("vera-edge: ")
        assert result.stderr.count("\n") == 1
        assert set(out.parent.iterdir()) == before
        return str(result.stderr)

    def test_missing_folders(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert "isn't a folder" in self.refused(cli, out, tmp_path / "none", tiny_adapter)
        assert "isn't a folder" in self.refused(cli, out, tiny_llama.nf4, tmp_path / "none")

    def test_one_unreadable_adapter_of_many(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
    ) -> None:
        out, words = tmp_path / "out", (tiny_llama.nf4, tiny_adapter)
        assert "isn't a folder" in self.refused(cli, out, *words, tmp_path / "none", "--each")
        assert f"called {tiny_adapter.name}" in self.refused(cli, out, *words, tiny_adapter, "--each")
        for wrong in ([tiny_adapter], ["--each", "--adapter", tiny_adapter]):
            result = cli("merge", *words, *wrong, "-o", out)
            assert result.exit_code == 2
            assert "--each merges every" in result.stderr
        assert not list(tmp_path.iterdir())

    def test_a_truncated_base(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
    ) -> None:
        base = Path(shutil.copytree(tiny_llama.nf4, tmp_path / "base"))
        file = base / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
        assert "model.safetensors" in self.refused(cli, tmp_path / "out", base, tiny_adapter)

    def test_an_adapter_of_another_base(
        self, tiny_llama: tiny.TinyLlama, tiny_gpt2_adapter: Path, cli: Cli, tmp_path: Path
    ) -> None:
        message = self.refused(cli, tmp_path / "out", tiny_llama.nf4, tiny_gpt2_adapter)
        assert "c_attn" in message

    def test_an_unknown_format(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
    ) -> None:
        message = self.refused(cli, tmp_path / "out", tiny_llama.nf4, tiny_adapter, "--to", "int3")
        assert "'int3'" in message

    def test_an_output_within_a_file(
        self, tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("x")
        result = cli("merge", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "file" / "out", "--to", "fp32")
        assert result.exit_code == 2
        assert "can't write" in result.stderr
        assert (tmp_path / "file").read_text() == "x"


def test_the_output_is_a_base_again(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, cli: Cli, tmp_path: Path
) -> None:
    """What was merged can be merged into: the folder is an ordinary checkpoint for vera-edge too."""
    cli("merge", tiny_llama.nf4, tiny_adapter, "-o", tmp_path / "once", "--to", "fp32")
    result = cli("merge", tmp_path / "once", tiny_adapter, "-o", tmp_path / "twice", "--weight", "-1")
    assert result.exit_code == 0, result.stderr
    before, after = Checkpoint.open(tiny_llama.nf4), Checkpoint.open(tmp_path / "twice")
    for module in before.linears:
        assert np.allclose(after.dequantize(module), before.dequantize(module), rtol=0, atol=1e-6)
