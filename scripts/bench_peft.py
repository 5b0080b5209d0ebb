"""The model as it was trained, in torch with PEFT and bitsandbytes, as a worker of the speed benches.

python -m scripts.bench_peft BASE ADAPTER --threads N   one line in: tokens; one line out: two speeds
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from scripts.bench_turns import LONG


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    base = AutoModelForCausalLM.from_pretrained(given.base, device_map="cpu", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, given.adapter).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            print(_decode(model, int(line)), flush=True)


def _decode(model: Any, tokens: int) -> str:
    import torch

    begun = time.perf_counter()
    out = model(torch.arange(100, 100 + LONG)[None], use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return f"{LONG / (started - begun)} {tokens / (time.perf_counter() - started)}"


if __name__ == "__main__":
    main()
