"""A Python warning for a bundle that other programs compute wrongly on this processor."""

from __future__ import annotations

from vera_edge.bundle.manifest import Manifest


def warn_of_int8(manifest: Manifest) -> None:
    """Warn (BundleWarning) of a bundle whose int8 products overflow on this processor."""
    if manifest.needs_vnni:  # what most don't: the runtime takes a while to load
        from vera_edge.device.runtime import int8_products

        int8_products.warn(manifest)
