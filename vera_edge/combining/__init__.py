"""Adapters made of adapters: one of any method written as LoRA, several combined into one.

Comes in: a base and adapters. Gives: a PEFT folder, written layer by layer, and how far it is from what was
asked for. Numpy alone, but for the methods whose weights PEFT's own layers make.
"""
