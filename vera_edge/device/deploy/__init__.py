"""Bundles on a device: installed, updated, rolled back and fetched, each whole or not at all."""
