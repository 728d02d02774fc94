"""What every answer of the application is made of: its address, its headers, files, JSON."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
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
MOST_PIXELS = 2**27
"""Maximum pixels per image: a small file may expand to more than a browser's memory."""
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


def path_of(scope: Message) -> str:
    """Below where the application is mounted, without slashes around it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and (path + "/").startswith(root + "/"):  # as servers do since ASGI 3; older ones leave it out
        path = path[len(root) :]
    return path.strip("/")


def asked_path(scope: Message) -> bytes:
    """As it was asked for, percent-encoded. Frameworks that mount may add a slash to ``path``, or take one away."""
    raw: bytes = scope.get("raw_path") or quote(str(scope["path"])).encode()
    return raw.partition(b"?")[0]


def header_of(scope: Message, name: bytes) -> bytes:
    """A header's value; empty if it is not there."""
    value: bytes = next((value for key, value in scope["headers"] if key.lower() == name), b"")
    return value


def whole_number(text: str) -> int | None:
    """What a stranger gives for a whole number; None if it is none, or longer than any of ours."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def allow(scope: Message, method: str) -> None:
    """Raise `Refused` for any other method; where reading is allowed, so is asking for the headers alone."""
    if scope["method"] not in (method, "HEAD" if method == "GET" else method):
        raise Refused(405, f"this address takes {method}", headers=[(b"allow", method.encode())])


def without_body(send: Send) -> Send:
    """For ``HEAD``: the same headers, and nothing else."""

    async def sending(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return sending


def start(status: int, kind: bytes, headers: Headers) -> Message:
    """The beginning of an answer."""
    content = [] if not kind else [(b"content-type", kind)]
    return {"type": "http.response.start", "status": status, "headers": [*content, *_HEADERS, *headers]}


async def send_data(send: Send, data: bytes, kind: bytes, headers: Headers | None = None, status: int = 200) -> None:
    """A whole answer, which nobody keeps unless the headers say so."""
    more = headers if headers is not None else [(b"cache-control", b"no-store")]
    await send(start(status, kind, [(b"content-length", b"%d" % len(data)), *more]))
    await send({"type": "http.response.body", "body": data})


async def send_json(send: Send, value: Any, status: int = 200, headers: Headers | None = None) -> None:
    """An answer in JSON."""
    more = [(b"cache-control", b"no-store"), *(headers or [])]
    await send_data(send, msgspec.json.encode(value), b"application/json", more, status)


async def send_refusal(scope: Message, send: Send, refused: Refused) -> None:
    """In JSON for programs and the page's own requests; in a line of text for who reads it in a browser."""
    if b"text/html" in header_of(scope, b"accept"):
        headers = [(b"cache-control", b"no-store"), *refused.headers]
        text = f"stagecast: {refused.reason}\n".encode("utf-8", "replace")
        await send_data(send, text, b"text/plain; charset=utf-8", headers, refused.status)
    else:
        await send_json(send, {"error": refused.reason}, refused.status, refused.headers)


async def send_denial(send: Send, refused: Refused) -> None:
    """Instead of a WebSocket, where the server can send an answer of ours; others would send 403."""

    async def sending(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await send_json(sending, {"error": refused.reason}, refused.status, refused.headers)


async def send_redirect(scope: Message, send: Send) -> None:
    """To the address with a slash at its end, from which the page's relative ones are right."""
    name = quote(asked_path(scope).rpartition(b"/")[2] or b".", safe="%").encode()
    await send(start(307, b"", [(b"location", b"./" + name + b"/")]))  # the dot: no name leads to another host
    await send({"type": "http.response.body", "body": b""})


async def send_file(scope: Message, send: Send, folder: Path, name: str, limiter: anyio.CapacityLimiter | None) -> None:
    """Send a file of the page, by the ending of its name. Waits for the disk, on a thread. Raises `Refused`."""
    kind = _KINDS.get(Path(name).suffix, "application/octet-stream")
    await _send_file(scope, send, folder, name, limiter, lambda data: kind)


async def send_image(
    scope: Message, send: Send, folder: Path, name: str, limiter: anyio.CapacityLimiter | None
) -> None:
    """Send an image below a run's folder. Waits for the disk, on a thread.

    Raises:
        Refused: There is no such file, a link leads to it, or its content is not that of an image, whatever its name.
    """
    await _send_file(scope, send, folder, name, limiter, image_kind)


def image_kind(data: bytes) -> str | None:
    """The media type of an image that is shown, by its content; None for anything else."""
    if not data.startswith(_PNG) or len(data) < 24:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return "image/png" if 0 < width * height <= MOST_PIXELS else None


async def _send_file(
    scope: Message,
    send: Send,
    folder: Path,
    name: str,
    limiter: anyio.CapacityLimiter | None,
    kind_of: Callable[[bytes], str | None],
) -> None:
    allow(scope, "GET")
    try:
        data, stamp = await anyio.to_thread.run_sync(read_file, folder, name, limiter=limiter)
    except (OSError, ValueError):  # ValueError: dots or NUL in its name
        raise Refused(404, "there is nothing at this address") from None
    kind = kind_of(data)
    if kind is None:
        raise Refused(404, "there is nothing at this address")
    headers = [(b"etag", stamp), (b"cache-control", b"no-cache")]
    if header_of(scope, b"if-none-match") == stamp:
        await send(start(304, b"", headers))
        await send({"type": "http.response.body", "body": b""})
        return
    await send_data(send, data, kind.encode(), headers)


def read_file(folder: Path, name: str) -> tuple[bytes, bytes]:
    """Read a regular file below a folder, following no link; returns it and its ETag.

    Raises:
        OSError: It is missing, is a link or a special file, or has more than `MOST_FILE` bytes.
        ValueError: The name is not a path below a folder.
    """
    with open(open_below(folder, name), "rb") as file:
        state = os.fstat(file.fileno())
        data = file.read(MOST_FILE + 1) if state.st_size <= MOST_FILE else b""
        if not state.st_size == len(data) <= MOST_FILE:  # too large, or it is being written
            raise FileNotFoundError(name)
        return data, b'"%x-%x"' % (state.st_mtime_ns, state.st_size)
