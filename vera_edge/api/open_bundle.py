"""`vera_edge.open_bundle`: a bundle to run, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.api.arguments import StrPath, size_or_none
from vera_edge.bundle import contents
from vera_edge.errors import PlanError
from vera_edge.progress import Tell, unheard

if TYPE_CHECKING:
    from vera_edge.device.runtime.encoder import Encoder
    from vera_edge.device.runtime.four_bit_graph import FourBit
    from vera_edge.device.runtime.session import Session

__all__ = ["open_bundle"]


def open_bundle(
    bundle: StrPath,
    *,
    adapter: str | Path | None = "default",
    threads: int | None = None,
    fast: bool = False,
    reread: bool = False,
    four_bit: FourBit | None = None,
    prompt_cache: int | str = 0,
    resident: bool = False,
    huge_pages: bool = False,
    tell: Tell = unheard,
) -> Session | Encoder:
    """Verify a bundle and open it: a Session for a model that gives text, an Encoder for another.

    Args:
        bundle: the bundle's folder.
        adapter: branch mode: "default", a name of the bundle, an .onnx_adapter file; "none" or None for the
            base alone.
        threads: threads per operator; None: all cores.
        fast: don't look at the content of files over 64 MiB before they run.
        reread: read also what an earlier start has read and nobody has written to since.
        four_bit: how NF4 and FP4 weights run: "expanded" to int8 blocks in memory, "int8", the same with
            activations rounded to int8, or "kept" as they are, exactly and slowly; None: kept where the
            bundle's own limit on the mean KL is under 0.005, else expanded.
        prompt_cache: bytes, or words like "64MB", in which prompts are kept: what later ones begin with alike
            is computed once. Not for encoders.
        resident: let the adapter live in the graph, where it decodes a little faster, with the same logits.
        huge_pages: move the weights to pages of 2 MB: opening takes longer, each token less (Linux).
        tell: given sentences: what wasn't read, what the expanding took, how much was moved.

    Returns:
        What `Session.open` or `Encoder.open` gives.

    Raises:
        BundleError: the bundle is damaged, foreign, or needs more memory than there is.
        AdapterError, MismatchError: the adapter can't be used, or is merged and can't be resident.
        PlanError: 4-bit weights can't run so, fast and reread contradict each other, or an encoder's adapter
            should be resident.

    Example:
        >>> session = vera_edge.open_bundle("bundle", adapter=None)
        >>> session.adapter is None, session.generate("Hello", max_tokens=4).finish is None
        (True, True)
    """
    from vera_edge.device.runtime.huge_pages import told
    from vera_edge.device.runtime.opened import named  # the runtime comes with it

    folder = Path(bundle)
    manifest = contents.read(folder)
    chosen = named(adapter, manifest) if isinstance(adapter, str) else adapter
    if manifest.kind == "encoder":
        if resident:
            raise PlanError(
                f"{folder} is an encoder; only models that generate text keep an adapter resident"
            )
        from vera_edge.device.runtime.encoder import Encoder

        opened: Session | Encoder = Encoder.open(
            folder,
            chosen,
            threads=threads,
            deep=not fast,
            four_bit=four_bit,
            reread=reread,
            huge_pages=huge_pages,
        )
    else:
        from vera_edge.device.runtime.session import Session

        size = size_or_none(prompt_cache) or 0
        opened = Session.open(
            folder,
            chosen,
            threads=threads,
            deep=not fast,
            four_bit=four_bit,
            prompt_cache=size,
            reread=reread,
            resident=resident,
            huge_pages=huge_pages,
        )
    if opened.verified is not None and opened.verified.told is not None:
        tell(opened.verified.told)
    for note in opened.graph.notes:
        tell(note)
    if opened.graph.rewritten is not None:
        tell(opened.graph.rewritten.told)
    if huge_pages:
        tell(told(opened.graph.moved))
    return opened
