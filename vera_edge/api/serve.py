"""`vera_edge.serve`: a bundle behind OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vera_edge.api.arguments import StrPath, path_or_none, size_or_none
from vera_edge.api.open_bundle import open_bundle
from vera_edge.api.trust import check_signature, trust_in
from vera_edge.errors import PlanError
from vera_edge.progress import Tell, unheard

if TYPE_CHECKING:
    from vera_edge.device.runtime.four_bit_graph import FourBit

__all__ = ["serve"]


def serve(
    bundle: StrPath,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    api_key_file: StrPath | None = None,
    rows: int = 8,
    queue: int = 32,
    context: int | None = None,
    timeout: float = 600.0,
    max_body: int | str = "4MB",
    varying: bool = False,
    adapters_from: StrPath | None = None,
    threads: int | None = None,
    fast: bool = False,
    reread: bool = False,
    four_bit: FourBit | None = None,
    prompt_cache: int | str = "64MB",
    resident: bool = False,
    huge_pages: bool = False,
    trusted_keys: StrPath | None = None,
    trusted_identity: tuple[str, str] | None = None,
    require_signature: bool = False,
    allow_unsigned: bool = False,
    tell: Tell = unheard,
) -> None:
    """Answer OpenAI's protocol over HTTP until the process is interrupted; each adapter is a model's name.

    Args:
        bundle: the bundle's folder.
        host, port: where to listen; port 0 is a free one. Hosts that others reach need an API key.
        name: the model name of what the bundle runs by itself; None: the folder's name.
        api_key, api_key_file: what clients must send; the file holds it in one line.
        rows: texts that are generated together, at most.
        queue: requests that may wait; one more is sent away with 429.
        context: tokens that a prompt and its answer may have; None: the model's own context, 4096 at most.
        timeout: seconds that a request may take in all.
        max_body: bytes of a request, or words like "4MB".
        varying: let an answer's last digits depend on how many run beside it; quicker for one at a time.
        adapters_from: a folder that clients may add adapters from while it runs; None: they can't.
        threads: threads per operator; None: all cores.
        fast, reread: what is read before it runs; as in `open_bundle`.
        four_bit: how NF4 and FP4 weights run; as in `open_bundle`.
        resident: let the default adapter live in the graph: a little faster while nobody asks another.
        huge_pages: move the weights to pages of 2 MB; as in `open_bundle`.
        prompt_cache: bytes, or words like "64MB", in which prompts are kept: what later ones begin with alike
            is computed once; 0 keeps none.
        trusted_keys, trusted_identity, require_signature, allow_unsigned: as in `verify`, of the bundle and
            of adapters that are added.
        tell: given sentences: who signed the bundle, and where it is served.

    Returns:
        Nothing, once the server has ended.

    Raises:
        PlanError: the port is in use, a key is missing, or a bound can't be kept.
        BundleError: the bundle can't be opened, isn't signed by whom it must, or gives classes.

    Example:
        >>> vera_edge.serve("bundle", port=-1)
        Traceback (most recent call last):
        vera_edge.errors.PlanError: port -1 is none; give one from 0 (a free one) to 65535
    """
    from vera_edge.serving import server  # the extra `serve` comes with it
    from vera_edge.serving.settings import Settings

    trust = trust_in(trusted_keys, trusted_identity, require_signature, allow_unsigned)
    settings = Settings(
        rows=rows,
        queue=queue,
        context=context,
        timeout=timeout,
        max_body=size_or_none(max_body) or 0,
        varying=varying,
        api_key=_key(api_key, api_key_file),
        adapters_from=path_or_none(adapters_from),
        trust=trust,
    )
    with server.listen(host, port, settings.api_key) as listening:
        check_signature(Path(bundle), trust, tell)
        opened = open_bundle(
            bundle,
            threads=threads,
            fast=fast,
            reread=reread,
            four_bit=four_bit,
            prompt_cache=prompt_cache,
            resident=resident,
            huge_pages=huge_pages,
            tell=tell,
        )
        server.run(opened, name or server.model_name(Path(bundle)), listening, settings, tell)


def _key(api_key: str | None, file: StrPath | None) -> str | None:
    if file is None:
        return api_key
    if api_key is not None:
        raise PlanError("give api_key or api_key_file, one of them")
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, ValueError):
        raise PlanError(f"the API key can't be read from {file}; give a file with one line of text") from None
