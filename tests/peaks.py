"""What work takes at its peak: in forks of one process that has imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests import tiny

# Prints the forks' peaks in kB. A fork's peak begins with what it has then, which is the same for all.
_START = """
import json, os, sys
from pathlib import Path
exec(sys.argv[1])
for job in json.loads(sys.argv[3]):
    if os.fork() == 0:
        try:
            exec(sys.argv[2])
            status = open("/proc/self/status")
            print(next(line.split()[1] for line in status if line.startswith("VmHWM:")), flush=True)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.wait()
"""


def llama(layers: int, width: int, inner: int) -> Any:
    """A Llama with random weights in float32, of the tests' vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
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
    return LlamaForCausalLM(config)


def peaks(imports: str, work: str, jobs: Sequence[Any]) -> list[int]:
    """The bytes that `work`, Python, takes at most for each `job`; jobs: as JSON has them. Linux only."""
    done = subprocess.run(
        [sys.executable, "-c", _START, imports, work, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = [1024 * int(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs), done.stderr
    return found
