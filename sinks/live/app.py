"""The ASGI application: the page, the runs, and their events by WebSocket and Server-Sent Events.

It runs under any ASGI server, on asyncio and trio, and may be mounted at any path of a Starlette, FastAPI or Litestar
application: all its addresses are relative. It needs no lifespan: the tasks of its clients do its work, and it closes
its connections itself when the server shuts down (`sinks.live.shutdown`).

========================================  ================================================================
``GET /``                                 the page
``GET /api/runs``                         the list of runs
``GET /api/table``                        the table of runs, those that fulfil ``?filter=CONDITION``
``GET /api/runs/RUN_ID``                  a snapshot of one run
``GET /api/runs/RUN_ID/events``           the snapshot, then frames, as Server-Sent Events
``WS /api/runs/RUN_ID/ws``                the same, and commands; the first message is the client's ``hello``,
                                          with ``"gzip": true`` it gets snapshots compressed, as bytes
``GET /api/runs/RUN_ID/journal``          the events behind ``?since=SEQ``, as JSON lines
``POST /api/runs/RUN_ID/commands``        a command
``POST /api/runs/RUN_ID/notes``           a change of its name, colour, note and tags
``GET /api/runs/RUN_ID/media/PATH``       an image, sound or table in the run folder
``/api/push/PROJECT/...``                 runs that are pushed here (`sinks.live.pushes`)
========================================  ================================================================
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Coroutine
from urllib.parse import quote

import anyio
import anyio.to_thread
import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send
from starlette.websockets import WebSocket

from events.errors import ArgumentsError, RunFolderError, WireError
from events.run.damage import unreadable
from events.wire import decode_command
from sinks.live.access import Access, Refused, Request
from sinks.live.bounds import Limit, Unread
from sinks.live.client import (
    ENDING,
    MOST_INBOUND,
    NO_RUN,
    NO_TOKEN,
    Client,
    CommandSent,
    Hello,
    SnapshotWanted,
)
from sinks.live.clients import Clients
from sinks.live.frames import as_event, as_packed, as_text
from sinks.live.hub import Hub
from sinks.live.journal_body import JournalBody
from sinks.live.pushes import Pushes
from sinks.live.responses import (
    BoundedResponse,
    JsonResponse,
    ResponseAborted,
    read_page,
    refuse,
    send_image,
    takes_gzip,
    unchanged,
)
from sinks.live.runs import Runs, runs_of
from sinks.live.table import TableEndpoints

MOST_FOLLOWERS = 64
"""Maximum responses with a journal at a time, because each holds a part of it in memory; further ones get 503."""
MOST_IMAGES = 64
"""Maximum responses with an image at a time, because each holds an open file; further ones get 503."""
_JOURNAL_S = 0.05
"""Minimum seconds between two reads of a journal that a client follows; more where many follow."""
_REQUEST = "stagecast.request"
"""Entry of the scope with the `Request` that `Access` has checked."""


class LiveApp:
    """Serves runs to clients.

    Args:
        runs: The runs: `sinks.live.runs.RunsOfFolder`, or the path of its folder.
        access: Decides which clients may see runs, and command them.
        most_clients: Maximum streams and WebSockets at a time; further ones get 503.
        pushes: Receives the runs of sinks `Push`, by the tokens of their projects instead of ``access``.

    Raises:
        ArgumentsError: An argument has the wrong type.
    """

    def __init__(
        self,
        runs: Runs | str | os.PathLike[str],
        access: Access,
        most_clients: int = 1_000,
        *,
        pushes: Pushes | None = None,
    ) -> None:
        if not isinstance(access, Access):
            raise ArgumentsError(f"access must be Access(...), not {access!r:.80}")
        self._runs = runs_of(runs)
        self._access = access
        self._pushes = pushes
        self._clients = Clients(most_clients)
        self._followers = Limit(min(MOST_FOLLOWERS, max(1, most_clients // 4)), "journals")
        self._images = Limit(min(MOST_IMAGES, max(1, most_clients // 4)), "images")
        self._unread = Unread()
        self._table = TableEndpoints(self._runs, self._unread)
        self._page = read_page()
        run = "/api/runs/{run_id}"
        self._router = Router(
            [
                Route("/", self._page_file),
                Route("/page/{name}", self._page_file),
                Route("/api/runs", self._list_runs),
                Route("/api/table", self._list_rows),
                Route(run, self._snapshot),
                Route(f"{run}/events", self._events),
                Route(f"{run}/journal", self._journal),
                Route(f"{run}/commands", self._post_command, methods=["POST"]),
                Route(f"{run}/notes", self._post_notes, methods=["POST"]),
                Route(f"{run}/media/{{path:path}}", self._image),
                WebSocketRoute(f"{run}/ws", self._watch),
                *(pushes.routes if pushes is not None else ()),
            ],
            redirect_slashes=False,
            default=_nothing_here,
        )
        handler: ExceptionHandler = refuse  # type: ignore[assignment]  # one for both kinds of connections
        self._app = ExceptionMiddleware(self._check_and_route, {HTTPException: handler})

    @functools.cached_property
    def _folders(self) -> anyio.CapacityLimiter:
        """Limits the threads that read run folders for clients: decoding journals delays the event loop.

        Created when it is used: the server's event loop may be another than the one of the constructor's caller.
        """
        return anyio.CapacityLimiter(2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "lifespan":
            await self._router(scope, receive, send)
            return
        with contextlib.suppress(ResponseAborted, ClientDisconnect):  # the server closes an incomplete response
            await self._app(scope, receive, send)

    async def end(self) -> None:
        """Close all open connections; waits until they are closed, half a second at most.

        Not needed under uvicorn, hypercorn and gunicorn, whose shutdown the application detects itself. A host with
        another server calls it when its shutdown begins.
        """
        await self._clients.end()

    async def _check_and_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it to its endpoint below. Raises `Refused`."""
        request = Request(scope)
        path, is_socket = request.path, scope["type"] == "websocket"
        if {"transfer-encoding", "content-length"} <= set(request.headers):
            # A proxy that uses the other length would mix up its clients.
            text = "the request has two lengths; send either Content-Length or chunks"
            raise Refused(400, text, headers={"connection": "close"})
        self._access.check_host(request)
        # A browser sends an Origin for the page's modules too, and a proxy may have changed the Host.
        if is_socket or not (path == "" or path.startswith("page/")):
            self._access.check_origin(request)
        if "//" in path or "\n" in path:  # the host's check must see the path that is served
            raise Refused(404, "the address has an empty part or a line break; remove it", code=NO_RUN)
        if self._pushes is not None and path.startswith("api/push/") and not is_socket:
            self._pushes.check_token(request)
        else:
            if path.startswith("api/") and not is_socket:  # a WebSocket shows it with its first message
                self._access.check_token(request)
            await self._access.ask(request)
        if path == "" and not is_socket and not (asked := _asked_path(scope)).endswith(b"/"):
            # The page's relative addresses depend on the slash. The dot: no name leads to another host.
            name = quote(asked.rpartition(b"/")[2] or b".", safe="%")
            await BoundedResponse(status_code=307, headers={"location": f"./{name}/"})(scope, receive, send)
            return
        inner = {"app": self, "root_path": "", "path": f"/{path}", "path_params": {}, _REQUEST: request}
        await self._router({**scope, **inner}, receive, send)

    # --------------------------------------------------------------------------------- endpoints by HTTP

    async def _page_file(self, request: HttpRequest) -> Response:
        answer = self._page.get(request.path_params.get("name", "index.html"))
        if answer is None:
            raise Refused(404, "there is nothing at this address")
        etag = answer.headers["etag"]
        return unchanged(etag) if request.headers.get("if-none-match") == etag else answer

    async def _list_runs(self, request: HttpRequest) -> Response:
        return await self._table.list(request, commands=self._access.commands)

    async def _list_rows(self, request: HttpRequest) -> Response:
        return await self._table.get(request, commands=self._access.commands)

    async def _snapshot(self, request: HttpRequest) -> Response:
        hub = await self._hub(request)
        await hub.refresh()
        is_packed = takes_gzip(request)
        snapshot = await hub.snapshot(is_packed=is_packed)
        data, headers = (snapshot.packed, {"content-encoding": "gzip"}) if is_packed else (snapshot.data, {})
        headers["vary"] = "accept-encoding"
        return BoundedResponse(data, headers=headers, media_type="application/json", unread=self._unread)

    async def _image(self, request: HttpRequest) -> ASGIApp:
        hub = await self._hub(request)
        if hub.run_dir is None:
            raise Refused(404, "there is nothing at this address")
        run_dir, name = hub.run_dir, f"media/{request.path_params['path'].removeprefix('media/')}"

        async def send_counted(scope: Scope, receive: Receive, send: Send) -> None:
            with self._images.counted():
                await send_image(run_dir, name, self._folders, scope, receive, send)

        return send_counted

    async def _post_command(self, request: HttpRequest) -> Response:
        hub = await self._hub(request)
        answer = await self._command(hub, await _body_of(request))
        return JsonResponse(answer, 202 if answer["type"] == "sent" else 409 if self._access.commands else 403)

    async def _post_notes(self, request: HttpRequest) -> Response:
        if not self._access.commands:
            raise Refused(403, "this server takes no commands, and notes are one; stagecast watch --commands does")
        return await self._table.note(await self._hub(request), await _body_of(request))

    async def _command(self, hub: Hub, data: bytes, request: Request | None = None) -> dict[str, str | None]:
        """Send a command to the run, if the host's check allows ``request``; return the answer."""
        command_id = None
        try:
            command = decode_command(data)
            command_id = command.id
            if not self._access.commands:
                reason = "this server takes no commands"
            else:
                if request is not None:
                    await self._access.ask(request)
                if hub.may_take_commands:
                    await hub.command(command)
                    return {"type": "sent", "id": command_id}
                reason = "the run is not under way"
        except Refused as refused:
            reason = refused.detail
        except (WireError, RunFolderError, OSError) as error:
            reason = str(error)
        return {"type": "refused", "id": command_id, "reason": reason}

    async def _journal(self, request: HttpRequest) -> ASGIApp:
        """Send the events behind a cursor; with ``follow=1`` until the run has ended."""
        hub = await self._hub(request)
        run_dir = hub.run_dir
        if run_dir is None:
            raise Refused(404, "this run keeps no journal")
        since = _whole_number(request.query_params.get("since", "0"))
        if since is None:
            raise Refused(400, "since is not the seq of an event; give a whole number")
        body = JournalBody(
            hub,
            since,
            follow=request.query_params.get("follow") == "1",
            limiter=self._folders,
            pause_s=lambda: max(_JOURNAL_S, self._followers.count * _JOURNAL_S / 8),
        )
        stream = self._stream("application/x-ndjson", body.write_to)

        async def send_journal(scope: Scope, receive: Receive, send: Send) -> None:
            with self._followers.counted(), hub.followed():
                if (problem := await anyio.to_thread.run_sync(unreadable, run_dir, limiter=self._folders)) is not None:
                    raise Refused(409, f"the run is damaged: {problem}")
                await stream(scope, receive, send)

        return send_journal

    async def _events(self, request: HttpRequest) -> ASGIApp:
        hub = await self._hub(request)
        attempt, _, since = request.headers.get("last-event-id", "").partition("-")
        hello = Hello(since=_whole_number(since), attempt=_whole_number(attempt))
        if hello.since is None or hello.attempt is None:
            query = request.query_params
            hello = Hello(since=_whole_number(query.get("since")), attempt=_whole_number(query.get("attempt")))
        return self._stream("text/event-stream", lambda client: client.send_frames(hub, hello, as_event))

    def _stream(self, media_type: str, write_all: Callable[[Client], Coroutine[object, object, None]]) -> ASGIApp:
        """Return a response of unknown length, which ends when it is complete or the client disconnects."""
        start = BoundedResponse(headers={"x-accel-buffering": "no"}, media_type=media_type)
        del start.headers["content-length"]

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["method"] == "HEAD":
                await start(scope, receive, send)
                return
            client = Client(receive, send, scope[_REQUEST].scope["headers"], self._unread)
            with self._clients.counted(client):
                await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})
                await self._clients.serve(client, client.wait_for_disconnect, functools.partial(write_all, client))
                with anyio.move_on_after(1.0), contextlib.suppress(OSError, RuntimeError):
                    if not client.has_left:
                        await send({"type": "http.response.body", "body": b""})

        return stream

    # ------------------------------------------------------------------------------------- by WebSocket

    async def _watch(self, websocket: WebSocket) -> None:
        """Send frames and receive commands, until the client disconnects. Raises `Refused` to close the connection."""
        request: Request = websocket.scope[_REQUEST]
        await websocket.accept()
        client = Client(websocket.receive, websocket.send, request.scope["headers"], self._unread)
        hello = await self._clients.hello(client)
        if hello is None:
            return
        if not isinstance(hello, Hello) or not self._access.allows(hello.token):
            raise Refused(401, "the first message is not a hello with the token", code=NO_TOKEN)
        with self._clients.counted(client):
            hub = await self._hub(websocket)

            async def listen() -> None:
                while (message := await client.receive()) is not None:
                    if isinstance(message, SnapshotWanted):
                        client.needs_snapshot = True
                    elif isinstance(message, CommandSent):
                        answer = await self._command(hub, bytes(message.command), request.as_command())
                        await client.send(msgspec.json.encode(answer).decode())
                client.disconnect()

            async def write() -> None:
                await client.send_frames(hub, hello, as_packed if hello.gzip else as_text)
                client.disconnect(Refused(503, "the run is over, and its server stops", code=ENDING))

            await self._clients.serve(client, listen, write)
            if client.problem is not None:
                raise client.problem

    async def _hub(self, connection: HTTPConnection) -> Hub:
        hub = await self._runs.hub(connection.path_params["run_id"])
        if hub is None:
            raise Refused(404, "there is no such run", code=NO_RUN)
        hub.allows_commands = self._access.commands
        hub.asked_at = time.monotonic()
        return hub


async def _body_of(request: HttpRequest) -> bytes:
    """Receive a command. Raises `Refused`."""
    # A form of another site cannot send this type: the browser would need our permission first.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "a command has the content type application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_INBOUND:
            raise Refused(413, f"a command has at most {MOST_INBOUND} bytes")
    return body


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    reason = "there is nothing at this address; a proxy that adds a path must also remove it"
    raise Refused(404, reason, code=NO_RUN)


def _asked_path(scope: Scope) -> bytes:
    """Return the path of the request line, percent-encoded: frameworks may add a slash to ``path``, or remove one."""
    raw: bytes = scope.get("raw_path") or quote(str(scope["path"])).encode()
    return raw.partition(b"?")[0]


def _whole_number(text: str | None) -> int | None:
    """Parse an untrusted whole number; None if it is not one, or has 20 digits or more."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 20 else None
