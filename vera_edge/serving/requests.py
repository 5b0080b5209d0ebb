"""What a request for text asks for, out of OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_edge.arrays import Tokens
from vera_edge.device.runtime.sampling import Sampling
from vera_edge.serving.fields import Fields, wrong

# Members that say nothing about the text: who asks, and how a service of many machines should treat it.
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
_MOST_STOPS, _LONGEST_STOP = 16, 1024
_ROLES = frozenset({"system", "user", "assistant", "developer"})


@dataclass(frozen=True)
class TextRequest:
    """prompt: messages of a chat, or a text or token ids to go on with. max_tokens: None for all that fit.

    logprobs: how many of the likeliest tokens are told beside each; None: no probabilities at all.
    """

    model: str
    prompt: str | Tokens | Sequence[Mapping[str, Any]]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None
    template_args: Mapping[str, Any]
    echo: bool = False


def chat(body: Mapping[str, Any]) -> TextRequest:
    """A request to /v1/chat/completions. Raises RefusedRequestError (400) that names the member at fault."""
    fields = Fields(body)
    messages = _messages(fields.raw("messages"))
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", None, 0, 20)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs: true")
    for name in ("tools", "functions"):
        fields.only(name, [], why="can't be called here: no calls are read out of what a model writes")
    for name in ("tool_choice", "function_call"):
        fields.only(name, "none", "auto", why="chooses a tool, and none can be called here")
    fields.only("response_format", {"type": "text"}, why="can't be kept to here; ask for text")
    fields.only("modalities", ["text"], why="holds something else than text")
    fields.flag("parallel_tool_calls")
    longest = fields.whole("max_completion_tokens", None, 1, 1 << 31)
    asked = _common(fields, messages, longest, (top or 0) if wanted else None)
    fields.end(_IGNORED)
    return asked


def completion(body: Mapping[str, Any]) -> TextRequest:
    """A request to /v1/completions. Raises as `chat`."""
    fields = Fields(body)
    prompt = _prompt(fields.raw("prompt"))
    logprobs = fields.whole("logprobs", None, 0, 20)
    fields.only("suffix", "", why="can't be filled up to here")
    fields.only("best_of", 1, why="must be 1")
    fields.only("echo", False, why="isn't done here; put the prompt before the answer yourself")
    asked = _common(fields, prompt, None, logprobs, 16)
    fields.end(_IGNORED)
    return asked


def _common(
    fields: Fields, prompt: Any, longest: int | None, logprobs: int | None, default: int | None = None
) -> TextRequest:
    """What both kinds of requests have."""
    fields.only("n", 1, why="must be 1: one answer to a request; send several requests, they run together")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, 0, why="must be 0; repetition_penalty, above 1, makes a text repeat less")
    fields.only("logit_bias", {}, why="must be empty: tokens can't be favoured here")
    stream, options = fields.flag("stream"), fields.object("stream_options")
    if options and not stream:
        raise wrong("stream_options", "needs stream: true")
    given = fields.whole("max_tokens", default, 1, 1 << 31)
    return TextRequest(
        model=fields.text("model"),
        prompt=prompt,
        sampling=_sampling(fields),
        max_tokens=given if longest is None else longest,
        stop=_stops(fields.raw("stop")),
        stream=stream,
        include_usage=options.get("include_usage") is True,
        logprobs=logprobs,
        template_args=fields.object("chat_template_kwargs"),
    )


def _sampling(fields: Fields) -> Sampling:
    """OpenAI's defaults, and a few settings more that other servers have under these names."""
    seed = fields.whole("seed", None, -(1 << 63), (1 << 64) - 1)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    top_k = fields.whole("top_k", 0, -1, 1 << 31)
    return Sampling(
        temperature=fields.number("temperature", 1.0, 0.0, 100.0),
        top_k=max(0, top_k or 0),
        # 0 leaves the likeliest token, as every server has it.
        top_p=max(top_p, 1e-9),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        seed=None if seed is None else seed % (1 << 64),
    )


def _stops(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value or []
    sound = isinstance(given, list) and all(isinstance(entry, str) and entry for entry in given)
    if not sound or len(given) > _MOST_STOPS or any(len(entry) > _LONGEST_STOP for entry in given):
        raise wrong(
            "stop", f"must be a text or up to {_MOST_STOPS} of them, of up to {_LONGEST_STOP} characters"
        )
    return tuple(given)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "must be a list of one or more messages")
    return [_message(entry, number) for number, entry in enumerate(value)]


def _message(message: Any, number: int) -> dict[str, Any]:
    name = f"messages[{number}]"
    if not isinstance(message, dict):
        raise wrong(name, "must be an object with a role and a content")
    role = message.get("role")
    if role not in _ROLES:
        raise wrong(f"{name}.role", f"must be one of {', '.join(sorted(_ROLES))}")
    # "developer" is what OpenAI calls the system message of newer models; templates know the older word.
    return {"role": "system" if role == "developer" else role, "content": _content(message, name)}


def _content(message: Mapping[str, Any], name: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise wrong(f"{name}.content", "must be a text, or parts of type text")
    return "".join(text for text in texts if text is not None)


def _prompt(value: Any) -> str | Tokens:
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        if not all(0 <= token < 1 << 31 for token in value):
            raise wrong("prompt", "holds a number that is no token id")
        return np.array(value, np.int64)
    raise wrong("prompt", "must be one text, or the token ids of one; send a request for each text")
