"""Requests and responses of the application: addresses, headers, files, JSON."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import anyio
import anyio.to_thread
import msgspec

from events.safe_files import open_below
from sinks.live.access import Headers, Refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_FILE = 64 * 2**20
"""Maximum bytes of an image file."""
PART_BYTES = 2**16
"""Maximum bytes of a response that the server receives at a time: it holds them until the client reads."""
STALL_S = 30.0
"""Maximum seconds per part of a response."""
LEAST_BYTES_PER_S = 2**14
"""Minimum bytes per second at which a client must read a whole response."""
MOST_UNREAD_BYTES = 2**27
"""Maximum bytes of unread responses in memory per application."""
MOST_PIXELS = 2**27
"""Maximum pixels per image: a small file may expand to more than a browser's memory."""
_RETRY_AFTER: Headers = [(b"retry-after", b"5")]
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_HEADERS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


class AnswerAborted(Exception):
    """A response cannot be completed: its client does not read, or its file was truncated. The server closes it."""


class Unread:
    """Bounds the bytes of responses in memory until clients have read them. Belongs to the event loop.

    Responses of up to `PART_BYTES` are not counted: the server's own buffer per connection is as large.
    """

    def __init__(self, most_bytes: int = MOST_UNREAD_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0

    def add(self, count: int) -> int:
        """Count the bytes of a response; return the count for `remove`. One response is always allowed.

        Raises:
            Refused: Too many bytes are unread.
        """
        count = count if count > PART_BYTES else 0
        if count and self._bytes and self._bytes + count > self._most_bytes:
            raise busy(f"other clients have not read {self._bytes:,} bytes of their answers; try again later")
        self._bytes += count
        return count

    def remove(self, count: int) -> None:
        """Stop counting them."""
        self._bytes -= count

    @contextlib.contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Count the bytes of a response while it is sent. Raises `Refused`."""
        count = self.add(count)
        try:
            yield
        finally:
            self.remove(count)


def busy(reason: str) -> Refused:
    """Return the refusal of a request that the client may retry after some seconds."""
    return Refused(503, reason, code=1013, headers=_RETRY_AFTER)


def path_of(scope: Message) -> str:
    """Return the path below the mount point, without slashes around it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and (path + "/").startswith(root + "/"):  # as servers do since ASGI 3; older ones exclude the root path
        path = path[len(root) :]
    return path.strip("/")


def asked_path(scope: Message) -> bytes:
    """Return the path of the request line, percent-encoded: frameworks may add a slash to ``path``, or remove one."""
    raw: bytes = scope.get("raw_path") or quote(str(scope["path"])).encode()
    return raw.partition(b"?")[0]


def header_of(scope: Message, name: bytes) -> bytes:
    """Return a header's value; empty without the header."""
    value: bytes = next((value for key, value in scope["headers"] if key.lower() == name), b"")
    return value


def whole_number(text: str) -> int | None:
    """Parse an untrusted whole number; None if it is not one, or has 20 digits or more."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def allow(scope: Message, method: str) -> None:
    """Raise `Refused` for any other method; ``GET`` allows ``HEAD``."""
    if scope["method"] not in (method, "HEAD" if method == "GET" else method):
        raise Refused(
            405,
            f"{scope['method']} is not allowed at this address; use {method}",
            headers=[(b"allow", method.encode())],
        )


def check_framing(scope: Message) -> None:
    """Raise `Refused` for a request with two lengths: a proxy that uses the other one would mix up its clients."""
    names = {key.lower() for key, _ in scope["headers"]}
    if {b"transfer-encoding", b"content-length"} <= names:
        raise Refused(
            400,
            "the request has two lengths; send either Content-Length or chunks",
            headers=[(b"connection", b"close")],
        )


async def serve_lifespan(receive: Receive, send: Send) -> None:
    """Complete the startup and the shutdown of a server, which change nothing here."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def without_body(send: Send) -> Send:
    """Return a ``send`` for ``HEAD``: the headers without the body."""

    async def sending(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return sending


def start(status: int, kind: bytes, headers: Headers) -> Message:
    """Return the first message of a response."""
    content = [] if not kind else [(b"content-type", kind)]
    return {"type": "http.response.start", "status": status, "headers": [*content, *_HEADERS, *headers]}


async def send_data(
    send: Send,
    data: bytes,
    kind: bytes,
    headers: Headers | None = None,
    status: int = 200,
    unread: Unread | None = None,
) -> None:
    """Send a whole response, which no cache stores unless ``headers`` allow it.

    Args:
        unread: Counts the response while it is in memory; None if its size does not depend on a run.

    Raises:
        Refused: Too many bytes of other responses are unread.
        AnswerAborted: The client does not read.
    """

    async def read(begin: int, end: int) -> bytes:
        return data[begin:end]

    more = headers if headers is not None else [(b"cache-control", b"no-store")]
    with unread.holding(len(data)) if unread is not None else contextlib.nullcontext():
        await send(start(status, kind, [(b"content-length", b"%d" % len(data)), *more]))
        await _send_parts(send, len(data), read)


async def _send_parts(send: Send, size: int, read: Callable[[int, int], Awaitable[bytes]]) -> None:
    """Send a body, one part in memory at a time.

    Args:
        read: Returns the bytes of a range.

    Raises:
        AnswerAborted: The client reads too slowly, or the body is shorter than ``size``.
    """
    deadline = anyio.current_time() + STALL_S + size / LEAST_BYTES_PER_S
    begin = 0
    while True:
        end = min(size, begin + PART_BYTES)
        part = await read(begin, end)
        if len(part) != end - begin:
            raise AnswerAborted("the file was truncated while it was sent")
        with anyio.move_on_after(min(STALL_S, deadline - anyio.current_time())) as taking:
            await send({"type": "http.response.body", "body": part, "more_body": end < size})
        if taking.cancelled_caught:
            raise AnswerAborted(f"the client has read {begin:,} of {size:,} bytes, too slowly")
        begin = end
        if begin == size:
            return


async def send_json(
    send: Send, value: Any, status: int = 200, headers: Headers | None = None, unread: Unread | None = None
) -> None:
    """Send a response in JSON; see `send_data`."""
    more = [(b"cache-control", b"no-store"), *(headers or [])]
    await send_data(send, msgspec.json.encode(value), b"application/json", more, status, unread)


async def send_refusal(scope: Message, send: Send, refused: Refused) -> None:
    """Send the reason: as JSON to programs and the page, as a line of text to a browser's window."""
    if b"text/html" in header_of(scope, b"accept"):
        headers = [(b"cache-control", b"no-store"), *refused.headers]
        text = f"stagecast: {refused.reason}\n".encode("utf-8", "replace")
        await send_data(send, text, b"text/plain; charset=utf-8", headers, refused.status)
    else:
        await send_json(send, {"error": refused.reason}, refused.status, refused.headers)


async def send_denial(send: Send, refused: Refused) -> None:
    """Refuse a WebSocket with a response of our own; the server must have the extension for that."""

    async def sending(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await send_json(sending, {"error": refused.reason}, refused.status, refused.headers)


async def send_redirect(scope: Message, send: Send) -> None:
    """Redirect to the address with a slash at its end, on which the page's relative addresses depend."""
    name = quote(asked_path(scope).rpartition(b"/")[2] or b".", safe="%").encode()
    await send(start(307, b"", [(b"location", b"./" + name + b"/")]))  # the dot: no name leads to another host
    await send({"type": "http.response.body", "body": b""})


async def send_file(scope: Message, send: Send, folder: Path, name: str, limiter: anyio.CapacityLimiter | None) -> None:
    """Send a file of the page, with the type of its suffix. Waits for the disk, on a thread. Raises `Refused`."""
    allow(scope, "GET")
    try:
        data, stamp = await anyio.to_thread.run_sync(read_file, folder, name, limiter=limiter)
    except (OSError, ValueError):  # ValueError: dots or NUL in its name
        raise Refused(404, "there is nothing at this address") from None
    if not await _is_unchanged(scope, send, stamp):
        kind = _KINDS.get(Path(name).suffix, "application/octet-stream")
        await send_data(send, data, kind.encode(), _stamped(stamp))


async def send_image(
    scope: Message, receive: Receive, send: Send, folder: Path, name: str, limiter: anyio.CapacityLimiter
) -> None:
    """Send an image of a run folder, from its open file, as the client reads. Waits for the disk, on a thread.

    Raises:
        Refused: The file does not exist, is behind a link, or does not contain an image.
        AnswerAborted: The client does not read, or the file was truncated.
    """
    allow(scope, "GET")
    try:
        file, size, kind, stamp = await anyio.to_thread.run_sync(_open_image, folder, name, limiter=limiter)
    except (OSError, ValueError):
        raise Refused(404, "there is nothing at this address") from None

    async def read(begin: int, end: int) -> bytes:
        return await anyio.to_thread.run_sync(file.read, end - begin, limiter=limiter)

    with file:
        if await _is_unchanged(scope, send, stamp):
            return
        await send(start(200, kind.encode(), [(b"content-length", b"%d" % size), *_stamped(stamp)]))
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        aborted: AnswerAborted | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_at_disconnect, receive, tasks.cancel_scope)
            try:
                await _send_parts(send, size, read)
            except AnswerAborted as error:  # here, because a task group raises groups
                aborted = error
            tasks.cancel_scope.cancel()
        if aborted is not None:
            raise aborted


async def _cancel_at_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    """Stop reading the file once the client disconnects: servers ignore further parts."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _open_image(folder: Path, name: str) -> tuple[BinaryIO, int, str, bytes]:
    """Open an image; returns it with its size in bytes, its media type and its ETag. Raises as `read_file`."""
    file = open(open_below(folder, name), "rb")  # noqa: SIM115  # the caller closes it
    try:
        state = os.fstat(file.fileno())
        kind = image_kind(file.read(24))
        if kind is None or state.st_size > MOST_FILE:
            raise FileNotFoundError(name)
        file.seek(0)
    except BaseException:  # propagates unchanged, without the descriptor
        file.close()
        raise
    return file, state.st_size, kind, _stamp_of(state)


def image_kind(data: bytes) -> str | None:
    """Return the media type of an image by its content; None if the page does not show it."""
    if not data.startswith(_PNG) or len(data) < 24:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return "image/png" if 0 < width * height <= MOST_PIXELS else None


async def _is_unchanged(scope: Message, send: Send, stamp: bytes) -> bool:
    """Whether the client has the file already; sends the response in that case."""
    if header_of(scope, b"if-none-match") != stamp:
        return False
    await send(start(304, b"", _stamped(stamp)))
    await send({"type": "http.response.body", "body": b""})
    return True


def _stamped(stamp: bytes) -> Headers:
    return [(b"etag", stamp), (b"cache-control", b"no-cache")]


def _stamp_of(state: os.stat_result) -> bytes:
    return b'"%x-%x"' % (state.st_mtime_ns, state.st_size)


def read_file(folder: Path, name: str) -> tuple[bytes, bytes]:
    """Read a regular file below a folder, without following links; return its content and its ETag.

    Raises:
        OSError: It is missing, is a link or a special file, or has more than `MOST_FILE` bytes.
        ValueError: ``name`` is not a path below a folder.
    """
    with open(open_below(folder, name), "rb") as file:
        state = os.fstat(file.fileno())
        data = file.read(MOST_FILE + 1) if state.st_size <= MOST_FILE else b""
        if not state.st_size == len(data) <= MOST_FILE:  # too large, or it is being written
            raise FileNotFoundError(name)
        return data, _stamp_of(state)
