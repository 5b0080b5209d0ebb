"""Where a bundle is fetched from: a folder, or any static HTTP server that holds its files as they are.

A server that has byte ranges sends what it is asked for; one that hasn't sends the whole file, and says so by
its status (RFC 9110, section 14.2). An `Answer` tells the two apart, so that a reader takes each byte once.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any, Protocol

from vera_edge.errors import BundleError
from vera_edge.storage.files import safe_join

_TIMEOUT = 30.0  # seconds without a byte
_RANGE = re.compile(r"bytes 0*(\d+)-\d*/.*", re.ASCII)


class Bytes(Protocol):
    """What an answer's bytes are read from."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Answer:
    """The bytes of a file from `start` on. whole: to its end, whatever was asked for."""

    stream: Bytes
    start: int
    whole: bool


class Source(Protocol):
    """A place that holds a bundle's files."""

    name: str

    def open(
        self, file: str, start: int = 0, size: int | None = None
    ) -> AbstractContextManager[Answer | None]:
        """The `size` bytes from `start`, or the whole file; None when there is no such file.

        Raises BundleError when the source doesn't answer, OSError when a folder can't be read.
        """


def source_of(place: str) -> Source:
    """The source at `place`: a path, or a URL of http or https. Raises BundleError when it's no address."""
    scheme = place.partition("://")[0].lower() if "://" in place else ""
    if scheme in ("http", "https"):
        return _Server(place)
    if scheme:
        raise BundleError(f"{place} is neither a folder nor an address of http or https")
    return _Folder(place)


class _Folder:
    def __init__(self, place: str) -> None:
        self.name = place

    @contextmanager
    def open(self, file: str, start: int = 0, size: int | None = None) -> Iterator[Answer | None]:
        path = safe_join(Path(self.name), file)
        if not path.is_file():
            yield None
            return
        with path.open("rb") as stream:
            stream.seek(start)
            yield Answer(stream, start, whole=size is None)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib reads what a redirect says beside its place whole, however much it is, and follows it to ftp."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage
    ) -> Any:
        fp.close()  # then there is nothing to read
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.URLError(f"it leads to {newurl[:200]}, which is no address of http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Server:
    def __init__(self, place: str) -> None:
        self.name = place.rstrip("/")
        self._opener = urllib.request.build_opener(_Redirects)
        try:
            if not urllib.parse.urlsplit(place).hostname or not place.isprintable() or " " in place:
                raise ValueError("it names no host, or holds a space")
            _ = urllib.parse.urlsplit(place).port
        except ValueError as cause:
            raise BundleError(
                f"{place!r} isn't an address ({cause}); give one like https://host/path"
            ) from None

    @contextmanager
    def open(self, file: str, start: int = 0, size: int | None = None) -> Iterator[Answer | None]:
        request = urllib.request.Request(f"{self.name}/{urllib.parse.quote(file)}")
        if size is not None:
            request.add_header("Range", f"bytes={start}-{start + size - 1}")
        answer = self._ask(request, file)
        if answer is None:
            yield None
            return
        with answer:
            yield self._read(answer, file, start)

    def _ask(self, request: urllib.request.Request, file: str) -> http.client.HTTPResponse | None:
        try:
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as cause:
            cause.close()
            if cause.code == 404:
                return None
            if cause.code == 416:
                raise BundleError(f"{self.name}/{file} ends early; publish the bundle again") from None
            raise BundleError(
                f"{self.name}/{file} answers {cause.code} {_one_line(cause.reason)}; try again later"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as cause:
            raise BundleError(
                f"{self.name} doesn't answer ({_one_line(cause)}); run again to go on from here"
            ) from None
        return answer

    def _read(self, answer: http.client.HTTPResponse, file: str, start: int) -> Answer:
        stream = _Body(answer, f"{self.name}/{file}")
        if answer.status != 206:
            return Answer(stream, 0, whole=True)
        told = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
        if told is not None and told[1] != str(start):  # which may have more digits than Python reads
            raise BundleError(f"{self.name}/{file} sends other bytes than asked for; use another server")
        return Answer(stream, start, whole=False)


@dataclass(frozen=True)
class _Body:
    """The body of an HTTP answer; what the link does to it is a BundleError."""

    answer: http.client.HTTPResponse
    what: str

    def read(self, size: int, /) -> bytes:
        try:
            data = self.answer.read(size)
            if data or not size or not self.answer.length:
                return data
            raise self._broken("it was cut off")
        except http.client.IncompleteRead as cause:
            if cause.partial:
                return cause.partial
            raise self._broken("it was cut off") from None
        except (OSError, http.client.HTTPException, ValueError) as cause:
            raise self._broken(_one_line(cause)) from None

    def _broken(self, why: str) -> BundleError:
        return BundleError(f"the link to {self.what} broke ({why}); run again to go on from here")


def _one_line(cause: object) -> str:
    text = " ".join(str(cause).split())[:200]
    return "".join(mark if mark.isprintable() else "?" for mark in text) or type(cause).__name__
