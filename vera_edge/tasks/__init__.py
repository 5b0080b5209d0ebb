"""What a model does, by its class: text, embeddings, classes; and how wide its head and vocabulary are.

Comes in: a config, and what adapters say of their training. Gives: a `Task` and the class in
transformers.
"""
