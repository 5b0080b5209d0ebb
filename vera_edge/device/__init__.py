"""Running a bundle: numpy, onnxruntime, tokenizers, jinja2, llama_cpp; never torch, transformers, onnx.

graph     an ONNX graph opened in ONNX Runtime, and what its inputs say
projections  drawn from the seed where a bundle ships no more
adapters  the vectors of a .onnx_adapter, checked against a graph
decoding  one step of a decoder with a KV cache that is never copied
sampling  logits to a token
chat      messages to text, text to tokens, tokens back to whole characters
template  chat templates as transformers renders them (template_language: its names and
          filters; metering, meter: its bounds)
stopping  stop strings, special tokens in them included
generate  streaming generation
prompt_cache  what prompts begin with alike, computed once
lookahead  several tokens in one step where a text repeats itself (ngrams, token_graph, row_products)
opened    a verified bundle with its graph and active adapter
session   a decoder behind one class: `Session.open(folder)`
encoder   an encoder behind another: `Encoder.open(folder)`; pooling: hidden states to an embedding
golden    what the reference answered, carried in the bundle (golden_encoder: an encoder's)
validate  the golden vectors on this device (validate_encoder: an encoder's; checks: what only a device shows)
bench     speed and memory over rounds (bench_round: one of them, in its own process; energy: RAPL)
install   versions on the device, the `current` link, rollback
"""
