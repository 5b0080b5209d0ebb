"""Adapters that were really trained, a QLoRA on NF4, an rsLoRA on GPTQ, a DoRA on bfloat16, go all the way.

Of SmolLM2 and of each adapter the first layers are taken: real weights at a price that a test can pay.
docs/drift-table.md has the whole model.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

from scripts.lora_training import FOLDER, RECIPES
from scripts.prepare_demo import Demo
from tests import exported, tiny
from tests.conftest import Cli
from tests.unit.bundle.test_signing import make_key
from vera_edge.device.runtime.session import Session
from vera_edge.storage import side_files
from vera_edge.training import load

pytestmark = pytest.mark.real
LAYERS, VOCABULARY = 3, 49152
PROMPT = 'What does the Python reference say about "The "import" statement"?'
FORMATS = {"qlora-nf4": "nf4", "lora-gptq": "gptq", "dora-bf16": "bf16"}
RELEASE = """
[release]
name = "real"
[[base]]
id = "base"
path = "{base}"
[[adapter]]
id = "style"
base = "base"
path = "adapter"
[[variant]]
mode = "branch"
weights = "int8"
[limits]
data = "text.txt"
tokens = 256
window = 32
max_kl = 0.05
[sign]
key = "publisher.key"
public_key = "publisher.pem"
"""


@dataclass(frozen=True)
class Trained:
    """The first layers of a base and of the adapter that was trained on it."""

    name: str
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / RECIPES[self.name].base

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def logits(self, ids: exported.Int64, active: bool = True) -> exported.Float32:
        """PEFT's own unmerged forward over the base's exact values.

        They are transformers' own where the base is in floats; nothing else here computes with an NF4 or GPTQ
        base's values as they are stored, which other tests hold against bitsandbytes and AutoGPTQ's layout.
        """
        model = tiny.load(self.base) if "bf16" in self.base.name else load(self.base)
        wrapped = PeftModel.from_pretrained(model, self.adapter).eval()
        with contextlib.nullcontext() if active else wrapped.disable_adapter():
            return forward(wrapped, ids)


def forward(model: Any, ids: exported.Int64) -> exported.Float32:
    import torch

    with torch.no_grad():
        found: exported.Float32 = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return found


@pytest.fixture(scope="module", params=list(RECIPES))
def trained(request: pytest.FixtureRequest, demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    found = Trained(request.param, tmp_path_factory.mktemp(request.param))
    base = demo.folder / RECIPES[found.name].base
    cut(base / "model.safetensors", found.base)
    cut(FOLDER / found.name / "adapter_model.safetensors", found.adapter)
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (found.base / "config.json").write_text(json.dumps(config))
    config = json.loads((FOLDER / found.name / "adapter_config.json").read_text())
    (found.adapter / "adapter_config.json").write_text(json.dumps(config))
    side_files.copy(base, found.base)
    found.text.write_text(demo.eval_text.read_text()[:6000])
    make_key(found.folder, "publisher")
    (found.folder / "release.toml").write_text(RELEASE.format(base=found.base.name))
    return found


def cut(file: Path, folder: Path) -> None:
    """Write the tensors of a file that are of no layer, or of the first ones."""
    folder.mkdir()
    tensors = {name: tensor for name, tensor in load_file(file).items() if layer(name) < LAYERS}
    save_file(tensors, folder / file.name, {"format": "pt"})


def layer(tensor: str) -> int:
    return int(tensor.split("layers.")[1].split(".")[0]) if "layers." in tensor else 0


def told(cli: Cli, *words: object) -> dict[str, Any]:
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_is_shipped_is_of_todays_recipe(name: str) -> None:
    record = json.loads((FOLDER / name / "training.json").read_text())
    recipe = json.loads(json.dumps(asdict(RECIPES[name])))
    assert {key: record[key] for key in recipe} == recipe
    config = json.loads((FOLDER / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == RECIPES[name].base
    assert config["r"] == recipe["rank"] and config["use_dora"] is recipe["dora"]
    assert record["held_out_perplexity_adapter"] < 0.7 * record["held_out_perplexity_base"]
    assert "license: apache-2.0" in (FOLDER / name / "README.md").read_text()


def test_merges_are_peft_s_own_or_say_what_drowned(trained: Trained, cli: Cli, tmp_path: Path) -> None:
    ids = exported.tokens(96, VOCABULARY)
    truth, base = trained.logits(ids), trained.logits(ids, active=False)
    effect = exported.divergence(truth, base)
    lost = {}
    for to in ("fp32", "same", "int8"):
        out = tmp_path / to
        merged = told(cli, "merge", trained.base, trained.adapter, "-o", out, "--to", to, "--method", "rtn")
        found = forward(load(out), ids)
        lost[to] = exported.divergence(truth, found) / effect
        if to == "fp32":
            assert exported.error(found, truth) < 1e-5
        if to == "same":
            assert (merged["warning"] is None) == (FORMATS[trained.name] == "bf16")
    assert lost["int8"] < 0.1
    assert (lost["same"] < 0.01) == (FORMATS[trained.name] == "bf16")


@pytest.mark.parametrize("trained", ["qlora-nf4"], indirect=True)
def test_a_release_is_gated_signed_validated_and_run(trained: Trained, cli: Cli, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    told(cli, "release", trained.folder / "release.toml", "-o", out, "--store", store)
    (bundle,) = out.glob("style/*")
    drift = json.loads((bundle / "evidence" / "drift.json").read_bytes())
    assert drift["passed"] and drift["retained"]["value"] > 0.9
    ids = exported.tokens(64, VOCABULARY)
    assert exported.divergence(trained.logits(ids), Session.open(bundle).logits(ids)) < 0.02
    told(cli, "validate", bundle, "--trusted-keys", trained.folder / "publisher.pem", "--require-signature")
    words = ("run", bundle, PROMPT, "--max-tokens", 8)
    assert told(cli, *words)["tokens"] != told(cli, *words, "--adapter", "none")["tokens"]
