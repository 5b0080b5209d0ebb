"""`vera_edge.chat`: a conversation with a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vera_edge.api.arguments import StrPath
from vera_edge.api.open_bundle import open_bundle
from vera_edge.device.runtime.conversation import Conversation
from vera_edge.device.runtime.encoder import Encoder
from vera_edge.errors import BundleError
from vera_edge.progress import Tell, unheard

if TYPE_CHECKING:
    from vera_edge.device.runtime.four_bit_graph import FourBit

__all__ = ["Conversation", "chat"]


def chat(
    bundle: StrPath,
    *,
    adapter: str | Path | None = "default",
    system: str | None = None,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    speculate: int = 0,
    stop: str | Sequence[str] = (),
    template_args: Mapping[str, Any] | None = None,
    threads: int | None = None,
    fast: bool = False,
    reread: bool = False,
    four_bit: FourBit | None = None,
    prompt_cache: int | str = "64MB",
    resident: bool = False,
    huge_pages: bool = False,
    tell: Tell = unheard,
) -> Conversation:
    """Open a bundle for a conversation, which keeps what was said.

    Args:
        bundle, adapter, threads, fast, reread, four_bit, prompt_cache, resident, huge_pages, tell: as
            in `open_bundle`.
        system: a message before all others, which says how to answer.
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, speculate, stop,
            template_args: how answers are generated; as in `Session.generate`.

    Returns:
        A Conversation: `say` and `take` give an answer in pieces, `messages` is what was said.

    Raises:
        BundleError: the bundle can't be opened, holds an encoder, or has no chat template.
        AdapterError, MismatchError: the adapter can't be used.

    Example:
        >>> talk = vera_edge.chat("bundle", max_tokens=4)
        >>> answer = "".join(talk.say("Name a river."))
        >>> [message["role"] for message in talk.messages]
        ['user', 'assistant']
    """
    model = open_bundle(
        bundle,
        adapter=adapter,
        threads=threads,
        fast=fast,
        reread=reread,
        four_bit=four_bit,
        prompt_cache=prompt_cache,
        resident=resident,
        huge_pages=huge_pages,
        tell=tell,
    )
    if isinstance(model, Encoder):
        raise BundleError(f"{bundle} holds an encoder, which generates no text; `vera-edge run` asks it")
    return Conversation(
        model,
        system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        speculate=speculate,
        stop=stop,
        template_args=template_args,
    )
