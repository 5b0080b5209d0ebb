"""What bench_scale measures beside the commands: PEFT's merge, and an export opened by ONNX Runtime GenAI.

    python -m scripts.bench_scale_workers peft BASE ADAPTER OUT
    python -m scripts.bench_scale_workers decode FOLDER

Each says what it did as JSON on the last line of stdout.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

_PROMPT, _TOKENS = 16, 8


def main() -> None:
    warnings.filterwarnings("ignore")
    name, *words = sys.argv[1:]
    folders = [Path(word) for word in words]
    print(json.dumps(merge_with_peft(*folders) if name == "peft" else decode(*folders)))


def merge_with_peft(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Load base and adapter, merge in the base's own dtype, and save where PEFT and transformers can."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cpu")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    try:
        merged.save_pretrained(out)
    except NotImplementedError:
        return {"note": "without a save, which raises NotImplementedError"}
    return {}


def decode(folder: Path) -> dict[str, Any]:
    """Open an export, read a prompt and decode some tokens greedily."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = _PROMPT + _TOKENS
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.arange(100, 100 + _PROMPT, dtype=np.int32)[None])
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)[_PROMPT:]]
    if len(tokens) != _TOKENS or not np.isfinite(generator.get_logits()).all():
        raise SystemExit(f"{folder} gave {len(tokens)} tokens instead of {_TOKENS}, or logits that are NaN")
    return {"note": f"{_TOKENS} tokens decoded", "tokens": tokens}


if __name__ == "__main__":
    main()
