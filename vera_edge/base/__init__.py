"""A base model's folder as one object: its config, its tensors, which of them are the weights of linear
layers.

Comes in: a Hugging Face folder or a GGUF file, and how the base was loaded in training (`trained_as`).
Gives: a `Checkpoint`, whose weights are read when they are asked for.
"""
