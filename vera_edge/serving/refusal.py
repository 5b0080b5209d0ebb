"""What a request is refused with: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vera_edge.errors import AdapterError, DataError, MismatchError, PlanError, VeraEdgeError

_OF_THE_REQUEST = (DataError, PlanError, MismatchError, AdapterError)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RefusedRequestError(VeraEdgeError):
    """A request that isn't served. param: the member of the JSON at fault; code: for programs.

    headers: sent with the answer.
    """

    def __init__(
        self,
        status: int,
        message: object,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def of(error: VeraEdgeError) -> RefusedRequestError:
    """Any of our errors as a refusal: the request's fault with 400, the bundle's with 500."""
    if isinstance(error, RefusedRequestError):
        return error
    return RefusedRequestError(400 if isinstance(error, _OF_THE_REQUEST) else 500, error)
