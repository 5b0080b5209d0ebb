"""The same with Optimum, which pins an older transformers: runs in an environment of its own.

With `--embed` in place of the count: the mean of an encoder's last hidden states. Optimum has no adapters,
but its session can read their vectors from memory of ours, where they are exchanged in place.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from transformers import AutoTokenizer


def main(folder: str, prompt: str, count: str, adapter: str | None = None) -> None:
    found: dict[str, object] = {"consumer": f"optimum-onnx {version('optimum-onnx')}"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    if count == "--embed":
        encoder = ORTModelForFeatureExtraction.from_pretrained(folder)
        found["embedding"] = encoder(**inputs).last_hidden_state[0].mean(dim=0).tolist()
    else:
        options = onnxruntime.SessionOptions()
        stored = onnxruntime.AdapterFormat.read_adapter(adapter).get_parameters() if adapter else {}
        vectors = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(value.shape(), np.float32))
            for name, value in stored.items()
        }
        for name, value in vectors.items():
            options.add_initializer(name, value)
        model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
        for name, value in vectors.items():
            value.update_inplace(stored[name].numpy())
        tokens = model.generate(**inputs, max_new_tokens=int(count), do_sample=False)
        found["text"] = tokenizer.decode(tokens[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
