"""Responses of the application: their headers, and how they are sent to clients that may not read them."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from sinks.live.access import Refused
from sinks.live.bounds import LEAST_BYTES_PER_S, PART_BYTES, Unread
from sinks.live.client import NOT_ALLOWED
from sinks.live.images import open_image

STALL_S = 30.0
"""Maximum seconds per part of a response."""
_CLOSE_S = 5.0
"""Maximum seconds for closing a refused WebSocket."""
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""Of every response, unless it sets them itself."""


class ResponseAborted(Exception):
    """A response cannot be completed: its client does not read, or its file was truncated. The server closes it."""


class BoundedResponse(Response):
    """A response from memory, sent part by part as its client reads. Sending raises `Refused` and `ResponseAborted`.

    Args:
        unread: Counts the response while it is in memory; None if its size does not depend on a run.
    """

    def __init__(
        self,
        content: object = None,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
        *,
        unread: Unread | None = None,
    ) -> None:
        super().__init__(content, status_code, {**HEADERS, **(headers or {})}, media_type)
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if scope["type"] == "websocket":  # a handshake is refused
            await super().__call__(scope, receive, send)
            return
        body = b"" if scope["method"] == "HEAD" else bytes(self.body)

        async def read(begin: int, end: int) -> bytes:
            return body[begin:end]

        with self._unread.holding(len(body)) if self._unread is not None else contextlib.nullcontext():
            headers = list(self.raw_headers)  # a copy: a compressing middleware changes them, and some are reused
            await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
            await send_parts(send, len(body), read)


class JsonResponse(BoundedResponse):
    """A `BoundedResponse` in JSON."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode it."""
        return msgspec.json.encode(content)


async def send_parts(send: Send, size: int, read: Callable[[int, int], Awaitable[bytes]]) -> None:
    """Send a body, one part in memory at a time.

    Args:
        read: Returns the bytes of a range.

    Raises:
        ResponseAborted: The client reads too slowly, or the body is shorter than ``size``.
    """
    deadline = anyio.current_time() + STALL_S + size / LEAST_BYTES_PER_S
    begin = 0
    while True:
        end = min(size, begin + PART_BYTES)
        part = await read(begin, end)
        if len(part) != end - begin:
            raise ResponseAborted("the file was truncated while it was sent")
        with anyio.move_on_after(min(STALL_S, deadline - anyio.current_time())) as taking:
            await send({"type": "http.response.body", "body": part, "more_body": end < size})
        if taking.cancelled_caught:
            raise ResponseAborted(f"the client has read {begin:,} of {size:,} bytes, too slowly")
        begin = end
        if begin == size:
            return


async def send_image(
    folder: Path, name: str, limiter: anyio.CapacityLimiter, scope: Scope, receive: Receive, send: Send
) -> None:
    """Send an image of a run folder, from its open file, as the client reads. Waits for the disk, on a thread.

    Raises:
        Refused: There is no such image; see `open_image`.
        ResponseAborted: The client does not read, or the file was truncated.
    """
    try:
        image = await anyio.to_thread.run_sync(open_image, folder, name, limiter=limiter)
    except (OSError, ValueError):
        raise Refused(404, "there is nothing at this address") from None

    async def read(begin: int, end: int) -> bytes:
        return await anyio.to_thread.run_sync(image.file.read, end - begin, limiter=limiter)

    async def cancel_at_disconnect() -> None:  # servers ignore further parts
        while (await receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    with image.file:
        if Headers(scope=scope).get("if-none-match") == image.etag:
            await unchanged(image.etag)(scope, receive, send)
            return
        start = BoundedResponse(
            headers={**kept(image.etag), "content-length": str(image.size)}, media_type=image.media_type
        )
        if scope["method"] == "HEAD":
            await start(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})
        aborted: ResponseAborted | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_at_disconnect)
            try:
                await send_parts(send, image.size, read)
            except ResponseAborted as error:  # here, because a task group raises groups
                aborted = error
            tasks.cancel_scope.cancel()
        if aborted is not None:
            raise aborted


def takes_gzip(connection: HTTPConnection) -> bool:
    """Whether a client accepts a compressed response."""
    given = connection.headers.get("accept-encoding", "").lower()
    offers = [part.replace(" ", "").partition(";") for part in given.split(",")]
    return any(name == "gzip" and how not in ("q=0", "q=0.0") for name, _, how in offers)


def gzipped(connection: HTTPConnection, data: bytes) -> tuple[bytes, dict[str, str]]:
    """Compress a response for a client that accepts it; return it and its headers. Takes 10 ms per MB: call it on a
    thread."""
    if len(data) < 1_024 or not takes_gzip(connection):
        return data, {"vary": "accept-encoding"}
    return gzip.compress(data, 1, mtime=0), {"vary": "accept-encoding", "content-encoding": "gzip"}


def kept(etag: str) -> dict[str, str]:
    """Return the headers of a response that a browser may keep, and asks for again with its ``etag``."""
    return {"etag": etag, "cache-control": "no-cache"}


def unchanged(etag: str) -> BoundedResponse:
    """Return the answer to a client that has kept the response with this ``etag``."""
    return BoundedResponse(status_code=304, headers=kept(etag))


@functools.cache
def read_page() -> dict[str, BoundedResponse]:
    """Return the responses with the files of the page, by name: so no request for them waits for a disk."""
    responses: dict[str, BoundedResponse] = {}
    for file in Path(__file__).with_name("page").iterdir():
        data, media_type = file.read_bytes(), _MEDIA_TYPES.get(file.suffix, "text/plain")
        headers = kept(f'"{hashlib.sha256(data).hexdigest()[:32]}"')
        responses[file.name] = BoundedResponse(data, headers=headers, media_type=media_type)
    return responses


async def refuse(connection: Request | WebSocket, refused: Exception) -> Response | None:
    """Return the reason of a refusal; a WebSocket receives it here, or is closed if its server cannot send it."""
    assert isinstance(refused, HTTPException)
    if isinstance(connection, Request):
        return _reason(connection, refused)
    with anyio.move_on_after(_CLOSE_S), contextlib.suppress(OSError, RuntimeError, WebSocketDisconnect):  # it may leave
        is_handshake = connection.application_state == WebSocketState.CONNECTING
        if is_handshake and "websocket.http.response" in (connection.scope.get("extensions") or {}):
            await connection.send_denial_response(_reason(connection, refused))
        else:
            reason = refused.detail.encode()[:120].decode(errors="ignore")  # a close frame holds 123 bytes
            await connection.close(getattr(refused, "code", NOT_ALLOWED), reason)
    return None


def _reason(connection: HTTPConnection, refused: HTTPException) -> BoundedResponse:
    """Return the reason as JSON to programs and the page, and as a line of text to a browser's window."""
    reason, headers = refused.detail, refused.headers or {}
    if refused.status_code == 405:
        reason = f"{connection.scope['method']} is not allowed at this address; use {headers['Allow']}"
    if "text/html" in connection.headers.get("accept", ""):
        text = f"stagecast: {reason}\n".encode("utf-8", "replace")
        return BoundedResponse(text, refused.status_code, headers, "text/plain")
    return JsonResponse({"error": reason}, refused.status_code, headers)
