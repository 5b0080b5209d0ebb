"""The same with ONNX Runtime GenAI."""

from __future__ import annotations

import json
import sys

import onnxruntime_genai as og


def main(folder: str, prompt: str, count: str, adapter: str | None = None) -> None:
    model = og.Model(folder)
    tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
    tokens = tokenizer.encode(prompt)
    params.set_search_options(max_length=len(tokens) + int(count), do_sample=False)
    generator = og.Generator(model, params)
    if adapter:
        adapters = og.Adapters(model)
        adapters.load(adapter, "chosen")
        generator.set_active_adapter(adapters, "chosen")
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    text = tokenizer.decode(generator.get_sequence(0))
    print(json.dumps({"consumer": f"onnxruntime-genai {og.__version__}", "text": text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
