"""Releases: a recipe in, gated and signed bundles out, the same bytes every time."""
