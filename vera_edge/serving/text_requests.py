"""Requests for text, from their JSON to a job in the engine and a response that waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from vera_edge.arrays import Tokens
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.log_probabilities import TokenBytes
from vera_edge.device.runtime.session import Session
from vera_edge.errors import VeraEdgeError
from vera_edge.serving import requests
from vera_edge.serving.admission import Admission
from vera_edge.serving.answers import ChatAnswer, CompletionAnswer
from vera_edge.serving.engine import BatchEngine
from vera_edge.serving.guard import read_json, while_connected
from vera_edge.serving.job import AnswerPiece, Job
from vera_edge.serving.models import Models
from vera_edge.serving.refusal import RefusedRequestError
from vera_edge.serving.requests import TextRequest
from vera_edge.serving.settings import Settings
from vera_edge.serving.text_response import Outbox, TextResponse


class TextRequests:
    """Answers /v1/chat/completions and /v1/completions for one session."""

    def __init__(self, session: Session, models: Models, settings: Settings, admission: Admission) -> None:
        """Raises PlanError when the caches can't fit into memory."""
        self._session, self._models, self._settings = session, models, settings
        self._admission = admission
        self.engine = BatchEngine(session.decoder, settings, session.prompts)
        self._bytes = TokenBytes(session.text)

    async def chat(self, request: Request) -> TextResponse:
        """POST /v1/chat/completions."""
        return await self._answer(request, requests.chat, ChatAnswer)

    async def complete(self, request: Request) -> TextResponse:
        """POST /v1/completions."""
        return await self._answer(request, requests.completion, CompletionAnswer)

    async def _answer(
        self,
        request: Request,
        read: Callable[[Mapping[str, Any]], TextRequest],
        shape: type[ChatAnswer] | type[CompletionAnswer],
    ) -> TextResponse:
        asked = read(await read_json(request, self._settings.max_body))
        model = self._models.get(asked.model)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.timeout
        place = self._admission.enter()
        try:
            # Rendering and tokenizing take their time; the loop has others to serve.
            work = asyncio.to_thread(self._prepared, asked, lambda: self._models.vectors(model))
            tokens, vectors = await while_connected(request, work)
        except BaseException:
            place.leave()
            raise
        outbox: Outbox = asyncio.Queue()
        job = self._job(asked, tokens, vectors, _into(outbox, loop))

        def end() -> None:
            job.cancelled = True
            place.leave()

        fingerprint = f"fp_{self._session.manifest.digest[:12]}"
        answer = shape(asked.model, len(tokens), fingerprint, self._bytes, asked.logprobs is not None)
        self.engine.submit(job)
        return TextResponse(outbox, answer, asked.stream, asked.include_usage, deadline, end)

    def _prepared(self, asked: TextRequest, vectors: Callable[[], Vectors]) -> tuple[Tokens, Vectors]:
        """The prompt's token ids (n,) and the adapter's vectors.

        Raises RefusedRequestError when the prompt is too long, or of a kind that the model can't take.
        """
        raw = isinstance(asked.prompt, str)
        if raw and asked.template_args:
            raise RefusedRequestError(400, "chat_template_kwargs is for chats", "chat_template_kwargs")
        if not raw and not self._session.text.has_template and not hasattr(asked.prompt, "shape"):
            raise RefusedRequestError(400, "this model has no chat template; ask /v1/completions", "messages")
        tokens = self._session.tokens(asked.prompt, raw, asked.template_args)
        if len(tokens) >= self.engine.context:
            raise RefusedRequestError(
                400,
                f"the prompt has {len(tokens)} tokens, and {self.engine.context} fit with the answer",
                "messages" if not raw else "prompt",
                "context_length_exceeded",
            )
        return tokens, vectors()

    def _job(
        self,
        asked: TextRequest,
        tokens: Tokens,
        vectors: Vectors,
        deliver: Callable[[AnswerPiece | VeraEdgeError], None],
    ) -> Job:
        room = self.engine.context - len(tokens)
        limit = room if asked.max_tokens is None else min(room, asked.max_tokens)
        session = self._session
        return Job(
            session.decoder,
            session.text,
            tokens,
            vectors,
            asked.sampling,
            limit,
            asked.stop,
            asked.logprobs,
            deliver,
        )


def _into(outbox: Outbox, loop: asyncio.AbstractEventLoop) -> Callable[[AnswerPiece | VeraEdgeError], None]:
    """What another thread calls to put something into `outbox`."""

    def deliver(piece: AnswerPiece | VeraEdgeError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            loop.call_soon_threadsafe(outbox.put_nowait, piece)

    return deliver
