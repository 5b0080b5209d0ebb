"""The routes, and how whatever goes wrong in one is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vera_edge.device.runtime.encoder import Encoder
from vera_edge.device.runtime.session import Session
from vera_edge.errors import VeraEdgeError
from vera_edge.serving import embeddings, models, refusal
from vera_edge.serving.admission import Admission
from vera_edge.serving.fields import Fields
from vera_edge.serving.guard import check_caller, read_json, while_connected
from vera_edge.serving.models import Models
from vera_edge.serving.refusal import RefusedRequestError
from vera_edge.serving.settings import Settings
from vera_edge.serving.text_requests import TextRequests

Handler = Callable[[Request], Awaitable[ASGIApp]]


class App:
    """What a server answers with. asgi: the application; `start` and `stop` around its work."""

    def __init__(self, opened: Session | Encoder, names: Models, settings: Settings) -> None:
        """Raises PlanError when the caches can't fit into memory."""
        self._opened, self._models, self._settings = opened, names, settings
        self._admission = Admission(settings.open)
        decodes = isinstance(opened, Session)
        self._texts = TextRequests(opened, names, settings, self._admission) if decodes else None  # type: ignore[arg-type]
        self._worker = ThreadPoolExecutor(1, "vera-edge embedding")
        self._changing = asyncio.Lock()
        self.asgi = self._routed()

    def start(self) -> None:
        """Begin to generate."""
        if self._texts is not None:
            self._texts.engine.start()

    def stop(self) -> None:
        """End what runs."""
        if self._texts is not None:
            self._texts.engine.stop()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _routed(self) -> Starlette:
        texts = self._texts
        routes = [
            self._route("/health", self._health, "GET"),
            self._route("/v1/models", self._list, "GET"),
            self._route("/v1/models/{name:path}", self._show, "GET"),
            self._route("/v1/chat/completions", texts.chat if texts else self._no_text, "POST"),
            self._route("/v1/completions", texts.complete if texts else self._no_text, "POST"),
            self._route("/v1/embeddings", self._no_vectors if texts else self._embed, "POST"),
            self._route("/v1/adapters", self._list, "GET"),
            self._route("/v1/adapters", self._add, "POST"),
            self._route("/v1/adapters/{name:path}", self._remove, "DELETE"),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: _no_route,
            VeraEdgeError: _refused,
            ClientDisconnect: _nobody,
            Exception: _failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    def _route(self, path: str, handler: Handler, method: str) -> Route:
        async def checked(request: Request) -> ASGIApp:
            if path != "/health":
                check_caller(request, self._settings.api_key)
            return await handler(request)

        return Route(path, checked, methods=[method])

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "requests": self._admission.inside})

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [each.to_dict() for each in self._models]})

    async def _show(self, request: Request) -> Response:
        return JSONResponse(self._models.get(request.path_params["name"]).to_dict())

    async def _no_text(self, request: Request) -> Response:
        raise RefusedRequestError(400, "this model gives embeddings and no text; ask /v1/embeddings")

    async def _no_vectors(self, request: Request) -> Response:
        raise RefusedRequestError(400, "this model gives text; serve an embedding model for /v1/embeddings")

    async def _embed(self, request: Request) -> Response:
        asked = embeddings.read(await read_json(request, self._settings.max_body))
        model, place = self._models.get(asked.model), self._admission.enter()
        wanted = [True]

        def answer() -> dict[str, Any] | None:
            assert isinstance(self._opened, Encoder)
            return embeddings.answer(self._opened, asked, self._models.vectors(model), lambda: wanted[0])

        async def work() -> dict[str, Any] | None:
            return await asyncio.get_running_loop().run_in_executor(self._worker, answer)

        try:
            async with asyncio.timeout(self._settings.timeout):
                return JSONResponse(await while_connected(request, work()))
        except TimeoutError:
            raise RefusedRequestError(504, "the answer took longer than this server's time-out") from None
        finally:
            wanted[0] = False
            place.leave()

    async def _add(self, request: Request) -> Response:
        folder = self._settings.adapters_from
        if folder is None:
            raise _closed()
        fields = Fields(await read_json(request, self._settings.max_body))
        name, path = fields.text("name"), models.within(folder, fields.text("path"))
        fields.end(())
        async with self._changing:
            try:
                added = await asyncio.to_thread(self._models.add, name, path, self._settings.trust)
            except RefusedRequestError:
                raise
            except VeraEdgeError as cause:
                reason = str(cause).replace(f"{folder.resolve()}/", "")
                raise RefusedRequestError(400, reason, "path", "adapter_refused") from None
        return JSONResponse(added.to_dict(), 201)

    async def _remove(self, request: Request) -> Response:
        if self._settings.adapters_from is None:
            raise _closed()
        name = request.path_params["name"]
        async with self._changing:
            self._models.remove(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})


def _closed() -> RefusedRequestError:
    return RefusedRequestError(403, "adapters can't be changed here; start with --adapters-from FOLDER")


async def _no_route(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}"
    refused = RefusedRequestError(error.status_code, f"there is no {what} here", code="unknown_url")
    return JSONResponse(refused.body(), error.status_code, error.headers)


async def _refused(request: Request, error: VeraEdgeError) -> Response:
    refused = refusal.of(error)
    return JSONResponse(refused.body(), refused.status, refused.headers)


async def _nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # as nginx has it; nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    refused = RefusedRequestError(500, "the server failed on this request; its log says how")
    return JSONResponse(refused.body(), 500)
