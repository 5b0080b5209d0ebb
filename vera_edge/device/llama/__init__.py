"""A GGUF bundle in llama.cpp, by llama-cpp-python: logits, greedy text, adapters swapped."""
