"""Greedy text from a GGUF file in llama-cpp-python: with_llama.py FOLDER PROMPT COUNT [LORA].

Run by the interpreter of an environment of its own (bench_llama_cpp.environment), so it imports nothing of
ours. Prints JSON: consumer, text, tokens.
"""

import json
import sys
from pathlib import Path

from llama_cpp import Llama

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
lora = sys.argv[4] if len(sys.argv) > 4 else None
model = Llama(str(folder / "model.gguf"), n_ctx=256, verbose=False, lora_path=lora)
tokens = model.tokenize(prompt.encode(), add_bos=True, special=False)
found = []
for token in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
    found.append(token)
    if len(found) == count:
        break
text = model.detokenize(found).decode(errors="replace")
print(json.dumps({"consumer": "llama.cpp", "text": text, "tokens": found}))
