"""What an exported folder says of itself: its manifest, signature, chunks, and what changed between two.

Comes in: a folder from anywhere. Gives: a manifest that was checked, or one sentence. Standard library
only, as a device reads it before anything else.
"""
