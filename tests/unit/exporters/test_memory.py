"""An export's memory is that of one layer: it doesn't grow with their number, where it did with all held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

# Exports in a fresh process, parts of some MB at a time unless "whole", and prints its peak in bytes.
SCRIPT = """
import json, sys
from pathlib import Path
from vera_edge.exporting import target
from vera_edge_onnx.decoder import held
from vera_edge_onnx.graph import segments
base, adapter, out, whole = json.loads(sys.argv[1])
segments.MOST = 1 << 40 if whole else 1 << 24
held._AT_ONCE = 1 << 40 if whole else 1 << 24
target.export(Path(base), [(Path(adapter), 1.0)], Path(out), weights="int8")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def base_of(layers: int, folder: Path) -> tuple[Path, Path]:
    """A Llama with 46 MB of float32 weights to a layer, and an adapter on all of its linears."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(7)
    base = tiny.save(LlamaForCausalLM(config).to(torch.bfloat16), folder / "base")
    return base, tiny.make_adapter(base, folder / "adapter")


def peak(base: Path, adapter: Path, folder: Path, whole: bool = False) -> int:
    arguments = json.dumps([str(base), str(adapter), str(folder / "out"), whole])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_it_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    two, eight = base_of(2, tmp_path / "2"), base_of(8, tmp_path / "8")
    few, many = peak(*two, tmp_path / "few"), peak(*eight, tmp_path / "many")
    assert many / few < 1.06
    whole = peak(*eight, tmp_path / "whole", whole=True)
    assert whole / few > 1.3  # so that what holds all layers would have failed
