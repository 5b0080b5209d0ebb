"""The same with ONNX Runtime alone, which leaves the cache to its caller."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(folder: str, prompt: str, count: str, adapter: str | None = None) -> None:
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(Path(folder) / "onnx" / "model.onnx"))
    options = onnxruntime.RunOptions()
    if adapter:
        vectors = onnxruntime.LoraAdapter()
        vectors.Load(adapter)
        options.add_active_adapter(vectors)
    tokens: list[int] = tokenizer.encode(prompt).ids
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}
    present = [name.replace("past_key_values.", "present.") for name in past]
    new = tokens
    for _ in range(int(count)):
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64), **past}
        logits, *cache = session.run(["logits", *present], feeds, options)
        past = dict(zip(past, cache, strict=True))
        new = [int(logits[0, -1].argmax())]
        tokens = tokens + new
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    print(json.dumps({"consumer": f"onnxruntime {onnxruntime.__version__}", "text": text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
