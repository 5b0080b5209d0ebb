"""Text as token ids: the tokenizer of a folder, windows of a text, the built-in texts, how long a sequence
may be.

Comes in: a folder's tokenizer files and a text. Gives: ids. Used by calibration, drift and the device
alike.
"""
