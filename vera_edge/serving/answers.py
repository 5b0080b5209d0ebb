"""Pieces of an answer as OpenAI's objects: one object for the whole, or events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vera_edge.device.runtime.log_probabilities import TokenBytes, TokenChoice
from vera_edge.serving.job import AnswerPiece
from vera_edge.serving.refusal import RefusedRequestError

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_FINISH = {"end": "stop", "stop": "stop", "length": "length"}


def event(value: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def failed(error: RefusedRequestError) -> bytes:
    """What ends a stream whose status was sent already."""
    return event(error.body())


class Shape(Protocol):
    """How one kind of request is answered."""

    def whole(self, pieces: Sequence[AnswerPiece]) -> Json:
        """The answer in one object."""

    def opening(self) -> list[Json]:
        """What a stream begins with."""

    def chunk(self, piece: AnswerPiece) -> Json:
        """One event of a stream."""

    def usage(self, generated: int) -> Json:
        """The last event of a stream, where it was asked for."""


@dataclass
class TextAnswer:
    """What all objects of one answer have. fingerprint: tells bundles apart."""

    model: str
    prompt_tokens: int
    fingerprint: str
    bytes_of: TokenBytes
    logprobs: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, prefix: str, kind: str) -> Json:
        """The members that come first."""
        named = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return named | {"system_fingerprint": self.fingerprint}

    def counts(self, generated: int) -> Json:
        """OpenAI's usage object."""
        total = self.prompt_tokens + generated
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": total,
        }

    def written(self, token: int) -> str:
        """A token as text; half of a character shows as U+FFFD."""
        return self.bytes_of.of(token).decode("utf-8", "replace")


class ChatAnswer(TextAnswer):
    """Objects of /v1/chat/completions."""

    def whole(self, pieces: Sequence[AnswerPiece]) -> Json:
        content = "".join(piece.text for piece in pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprobs([token for piece in pieces for token in piece.tokens]),
            "finish_reason": _FINISH[pieces[-1].finish or "length"],
        }
        usage = self.counts(pieces[-1].generated)
        return self.head("chatcmpl", "chat.completion") | {"choices": [choice], "usage": usage}

    def opening(self) -> list[Json]:
        return [self._event({"role": "assistant", "content": ""}, None, None)]

    def chunk(self, piece: AnswerPiece) -> Json:
        finish = None if piece.finish is None else _FINISH[piece.finish]
        delta = {"content": piece.text} if piece.text else {}
        return self._event(delta, self._logprobs(piece.tokens), finish)

    def usage(self, generated: int) -> Json:
        return self._head() | {"choices": [], "usage": self.counts(generated)}

    def _event(self, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head() | {"choices": [choice]}

    def _head(self) -> Json:
        return self.head("chatcmpl", "chat.completion.chunk")

    def _logprobs(self, tokens: Sequence[TokenChoice]) -> Json | None:
        if not self.logprobs:
            return None
        return {"content": [self._token(each) for each in tokens], "refusal": None}

    def _token(self, chosen: TokenChoice) -> Json:
        top = [self._entry(token, logprob) for token, logprob in chosen.top]
        return self._entry(chosen.token, chosen.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> Json:
        return {"token": self.written(token), "logprob": logprob, "bytes": list(self.bytes_of.of(token))}


class CompletionAnswer(TextAnswer):
    """Objects of /v1/completions."""

    _offset = 0  # characters of the answer before the tokens that come next

    def whole(self, pieces: Sequence[AnswerPiece]) -> Json:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        found = self._object(text, tokens, _FINISH[pieces[-1].finish or "length"])
        return found | {"usage": self.counts(pieces[-1].generated)}

    def opening(self) -> list[Json]:
        return []

    def chunk(self, piece: AnswerPiece) -> Json:
        finish = None if piece.finish is None else _FINISH[piece.finish]
        return self._object(piece.text, piece.tokens, finish)

    def usage(self, generated: int) -> Json:
        return self.head("cmpl", "text_completion") | {"choices": [], "usage": self.counts(generated)}

    def _object(self, text: str, tokens: Sequence[TokenChoice], finish: str | None) -> Json:
        choice = {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}
        return self.head("cmpl", "text_completion") | {"choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenChoice]) -> Json | None:
        if not self.logprobs:
            return None
        offsets = []
        for each in tokens:
            offsets.append(self._offset)
            self._offset += len(self.written(each.token))
        return {
            "tokens": [self._key(each.token) for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [{self._key(token): value for token, value in each.top} for each in tokens],
            "text_offset": offsets,
        }

    def _key(self, token: int) -> str:
        """The token's text; a part of a character as OpenAI writes it, so that two parts differ."""
        data = self.bytes_of.of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
