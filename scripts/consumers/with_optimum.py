"""The same with Optimum, which pins an older transformers: runs in an environment of its own.

With `--embed` in place of the count: the mean of an encoder's last hidden states.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from transformers import AutoTokenizer


def main(folder: str, prompt: str, count: str) -> None:
    found: dict[str, object] = {"consumer": f"optimum-onnx {version('optimum-onnx')}"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    if count == "--embed":
        encoder = ORTModelForFeatureExtraction.from_pretrained(folder)
        found["embedding"] = encoder(**inputs).last_hidden_state[0].mean(dim=0).tolist()
    else:
        model = ORTModelForCausalLM.from_pretrained(folder)
        tokens = model.generate(**inputs, max_new_tokens=int(count), do_sample=False)
        found["text"] = tokenizer.decode(tokens[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
