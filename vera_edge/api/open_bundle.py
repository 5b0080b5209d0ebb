"""`vera_edge.open_bundle`: a bundle to run, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.api.arguments import StrPath
from vera_edge.bundle import contents

if TYPE_CHECKING:
    from vera_edge.device.runtime.encoder import Encoder
    from vera_edge.device.runtime.session import Session

__all__ = ["open_bundle"]


def open_bundle(
    bundle: StrPath,
    *,
    adapter: str | Path | None = "default",
    threads: int | None = None,
    fast: bool = False,
) -> Session | Encoder:
    """Verify a bundle and open it: a Session for a model that gives text, an Encoder for another.

    Args:
        bundle: the bundle's folder.
        adapter: branch mode: "default", a name of the bundle, an .onnx_adapter file; "none" or None for the
            base alone.
        threads: threads per operator; None: all cores.
        fast: don't read files over 64 MiB before they run.

    Returns:
        What `Session.open` or `Encoder.open` gives.

    Raises:
        BundleError: the bundle is damaged, foreign, or needs more memory than there is.
        AdapterError, MismatchError: the adapter can't be used.

    Example:
        >>> session = vera_edge.open_bundle("bundle", adapter=None)
        >>> session.adapter is None, session.generate("Hello", max_tokens=4).finish is None
        (True, True)
    """
    from vera_edge.device.runtime.opened import named  # the runtime comes with it

    folder = Path(bundle)
    manifest = contents.read(folder)
    chosen = named(adapter, manifest) if isinstance(adapter, str) else adapter
    if manifest.kind == "encoder":
        from vera_edge.device.runtime.encoder import Encoder

        return Encoder.open(folder, chosen, threads=threads, deep=not fast)
    from vera_edge.device.runtime.session import Session

    return Session.open(folder, chosen, threads=threads, deep=not fast)
