"""The ASGI application: the page, the runs, and their events by WebSocket and Server-Sent Events.

It needs anyio only, runs under any ASGI server, on asyncio and trio, and may be mounted at any path of a Starlette,
FastAPI or Litestar application: all its addresses are relative. It needs no lifespan: the tasks of its clients do its
work, and it closes its connections itself when the server shuts down (`sinks.live.shutdown`).

========================================  ================================================================
``GET /``                                 the page
``GET /api/runs``                         the list of runs
``GET /api/runs/RUN_ID``                  a snapshot of one run
``GET /api/runs/RUN_ID/events``           the snapshot, then frames, as Server-Sent Events
``WS /api/runs/RUN_ID/ws``                the same, and commands; the first message is the client's ``hello``
``GET /api/runs/RUN_ID/journal``          the events behind ``?since=SEQ``, as JSON lines
``POST /api/runs/RUN_ID/commands``        a command
``GET /api/runs/RUN_ID/media/PATH``       an image in the run folder
========================================  ================================================================
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
import msgspec

from events.errors import ArgumentsError, RunFolderError, WireError
from events.wire import decode_command
from sinks.damage import unreadable
from sinks.live.access import Access, Refused, Request
from sinks.live.asgi import (
    AnswerAborted,
    Message,
    Receive,
    Send,
    Unread,
    allow,
    asked_path,
    busy,
    check_framing,
    header_of,
    path_of,
    send_data,
    send_denial,
    send_file,
    send_image,
    send_json,
    send_redirect,
    send_refusal,
    serve_lifespan,
    start,
    whole_number,
    without_body,
)
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
from sinks.live.frame_stream import as_event, as_text, send_frames
from sinks.live.frames import Message as Sent
from sinks.live.hub import Hub
from sinks.live.journal_body import JournalBody
from sinks.live.runs import Runs, runs_of

_PAGE = Path(__file__).with_name("page")
HELLO_S = 10.0
"""Seconds that a client may take to send `Hello`."""
_CLOSE_S = 5.0
_RETRY = b"retry: 1000\n"
"""Milliseconds after which an `EventSource` reconnects. Part of the first event: some clients take a line on its own
for an event."""
MOST_FOLLOWERS = 64
"""Maximum responses with a journal at a time, because each holds a part of it in memory; further ones get 503."""
MOST_IMAGES = 64
"""Maximum responses with an image at a time, because each holds an open file; further ones get 503."""
_JOURNAL_S = 0.05
"""Minimum seconds between two reads of a journal that a client follows; more where many follow."""


class LiveApp:
    """Serves runs to clients.

    Args:
        runs: The runs: `sinks.live.runs.RunsOfFolder`, or the path of its folder.
        access: Decides which clients may see runs, and command them.
        most_clients: Maximum streams and WebSockets at a time; further ones get 503.

    Raises:
        ArgumentsError: An argument has the wrong type.
    """

    def __init__(self, runs: Runs | str | os.PathLike[str], access: Access, most_clients: int = 1_000) -> None:
        if not isinstance(access, Access):
            raise ArgumentsError(f"access must be Access(...), not {access!r:.80}")
        self._runs = runs_of(runs)
        self._access = access
        self._clients = Clients(most_clients)
        self._most_followers = min(MOST_FOLLOWERS, max(1, most_clients // 4))
        self._followers = 0
        self._most_images = min(MOST_IMAGES, max(1, most_clients // 4))
        self._images = 0
        self._unread = Unread()
        self._folders: anyio.CapacityLimiter
        """Limits the threads that read run folders for clients: decoding journals delays the event loop."""
        self._disk: anyio.CapacityLimiter | None = None
        """Our own, for the page: a disk that hangs must not occupy the threads of a host."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if self._disk is None:  # here, because a limiter belongs to the event loop's back end
            self._disk, self._folders = anyio.CapacityLimiter(4), anyio.CapacityLimiter(2)
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case "lifespan":
                await serve_lifespan(receive, send)

    async def end(self) -> None:
        """Close all open connections; waits until they are closed, half a second at most.

        Not needed under uvicorn, hypercorn and gunicorn, whose shutdown the application detects itself. A host with
        another server calls it when its shutdown begins.
        """
        await self._clients.end()

    # ---------------------------------------------------------------------------------------------- HTTP

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if scope["method"] == "HEAD":
            send = without_body(send)
        try:
            check_framing(scope)
            is_api = path == "api/runs" or path.startswith("api/runs/")
            is_page = path == "" or path.startswith("page/")
            self._access.check_host(scope)
            # A browser sends an Origin for the page's modules too, and a proxy may have changed the Host.
            if not is_page:
                self._access.check_origin(scope)
            if "//" in path:  # the host's check must see the path that is served
                raise Refused(404, "the address has an empty part; remove the double slash")
            if is_api:
                self._access.check_token(scope)
            await self._access.ask(Request(scope["method"], path, scope))
            if is_api:
                await self._api(scope, receive, send, path.removeprefix("api/runs").strip("/"))
            elif path == "" and not asked_path(scope).endswith(b"/"):
                await send_redirect(scope, send)
            elif path == "":
                await send_file(scope, send, _PAGE, "index.html", self._disk)
            elif path.startswith("page/"):
                await send_file(scope, send, _PAGE, path.removeprefix("page/"), self._disk)
            else:
                raise Refused(404, "there is nothing at this address; a proxy that adds a path must also remove it")
        except Refused as refused:
            await send_refusal(scope, send, refused)
        except AnswerAborted:
            return  # the server closes a connection whose response is not complete

    async def _api(self, scope: Message, receive: Receive, send: Send, path: str) -> None:
        if not path:
            allow(scope, "GET")
            await send_json(send, {"runs": await self._runs.summaries(self._access.commands)}, unread=self._unread)
            return
        run_id, _, rest = path.partition("/")
        hub = await self._hub(run_id)
        kind, _, inside = rest.partition("/")
        match kind:
            case "commands" if not inside:
                allow(scope, "POST")
                await self._post_command(hub, scope, receive, send)
                return
            case _:
                allow(scope, "GET")
        match kind:
            case "" if not inside:
                await hub.refresh()
                await send_data(send, (await hub.snapshot()).data, b"application/json", unread=self._unread)
            case "events" if not inside:
                await self._sse(hub, scope, receive, send)
            case "journal" if not inside:
                await self._journal(hub, scope, receive, send)
            case "media" if hub.run_dir is not None:
                await self._image(hub.run_dir, f"media/{inside.removeprefix('media/')}", scope, receive, send)
            case _:
                raise Refused(404, "there is nothing at this address")

    async def _image(self, run_dir: Path, name: str, scope: Message, receive: Receive, send: Send) -> None:
        if self._images >= self._most_images:
            raise busy(f"{self._images} clients read images, the maximum; try again later")
        self._images += 1
        try:
            await send_image(scope, receive, send, run_dir, name, self._folders)
        finally:
            self._images -= 1

    async def _hub(self, run_id: str) -> Hub:
        hub = await self._runs.hub(run_id)
        if hub is None:
            raise Refused(404, "there is no such run", code=NO_RUN)
        hub.allows_commands = self._access.commands
        hub.asked_at = time.monotonic()
        return hub

    async def _post_command(self, hub: Hub, scope: Message, receive: Receive, send: Send) -> None:
        # A form of another site cannot send this type: the browser would need our permission first.
        if header_of(scope, b"content-type").partition(b";")[0].strip() != b"application/json":
            raise Refused(415, "a command has the content type application/json")
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > MOST_INBOUND:
                raise Refused(413, f"a command has at most {MOST_INBOUND} bytes")
            if not message.get("more_body"):
                break
        answer = await self._command(hub, body)
        await send_json(send, answer, 202 if answer["type"] == "sent" else 409 if self._access.commands else 403)

    async def _command(self, hub: Hub, data: bytes, request: Request | None = None) -> dict[str, Any]:
        """Send a command to the run, if the host's check allows ``request``; return the answer."""
        try:
            command = decode_command(data)
        except WireError as error:
            return {"type": "refused", "id": None, "reason": str(error)}
        if not self._access.commands:
            return {"type": "refused", "id": command.id, "reason": "this server takes no commands"}
        if request is not None:
            try:
                await self._access.ask(request)
            except Refused as refused:
                return {"type": "refused", "id": command.id, "reason": refused.reason}
        if not hub.may_take_commands:
            return {"type": "refused", "id": command.id, "reason": "the run is not under way"}
        try:
            await hub.command(command)
        except (RunFolderError, OSError) as error:
            return {"type": "refused", "id": command.id, "reason": str(error)}
        return {"type": "sent", "id": command.id}

    async def _journal(self, hub: Hub, scope: Message, receive: Receive, send: Send) -> None:
        """Send the events behind a cursor; with ``follow=1`` until the run has ended."""
        if hub.run_dir is None:
            raise Refused(404, "this run keeps no journal")
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        since = _number(query, "since") if "since" in query else 0
        if since is None:
            raise Refused(400, "since is not the seq of an event; give a whole number")
        if self._followers >= self._most_followers:
            raise busy(f"{self._followers} clients read journals, the maximum; try again later")
        body = JournalBody(
            hub,
            since,
            follow=query.get("follow") == ["1"],
            limiter=self._folders,
            pause_s=lambda: max(_JOURNAL_S, self._followers * _JOURNAL_S / 8),
        )
        hub.followers += 1
        self._followers += 1  # without an await since the comparison, so that no other request passes in between
        try:
            if (problem := await anyio.to_thread.run_sync(unreadable, hub.run_dir, limiter=self._folders)) is not None:
                raise Refused(409, f"the run is damaged: {problem}")
            await self._stream(scope, receive, send, b"application/x-ndjson", body.write_to)
        finally:
            hub.followers -= 1
            self._followers -= 1

    async def _sse(self, hub: Hub, scope: Message, receive: Receive, send: Send) -> None:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        attempt, _, seq = header_of(scope, b"last-event-id").decode("latin-1").partition("-")
        hello = Hello(since=whole_number(seq), attempt=whole_number(attempt))
        if hello.since is None or hello.attempt is None:
            hello = Hello(since=_number(query, "since"), attempt=_number(query, "attempt"))

        async def write_all(client: Client) -> None:
            begin = [_RETRY]

            def shape(message: Sent | int) -> Message:
                event = as_event(message)
                return {**event, "body": begin.pop() + event["body"]} if begin else event

            await send_frames(hub, hello, client, shape)

        await self._stream(scope, receive, send, b"text/event-stream", write_all)

    async def _stream(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
        kind: bytes,
        write_all: Callable[[Client], Awaitable[None]],
    ) -> None:
        """Send a response of unknown length, until it is complete or the client disconnects."""
        if scope["method"] != "GET":
            raise Refused(405, "only GET is allowed at this address", headers=[(b"allow", b"GET")])
        client = Client(receive, send, scope["headers"], self._unread)
        with self._clients.counted(client):
            await send(start(200, kind, [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]))
            async with anyio.create_task_group() as tasks:
                client.scope = tasks.cancel_scope
                tasks.start_soon(client.wait_for_disconnect)
                tasks.start_soon(client.disconnect_if_stuck)
                tasks.start_soon(self._clients.close_with_server)
                await write_all(client)
                tasks.cancel_scope.cancel()
            with anyio.move_on_after(1.0), contextlib.suppress(OSError, RuntimeError):
                if not client.has_left:
                    await send({"type": "http.response.body", "body": b""})

    # ----------------------------------------------------------------------------------------- WebSocket

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        path = path_of(scope)
        parts = path.split("/")
        is_accepted = False
        try:
            self._access.check_request(scope)
            await self._access.ask(Request("WEBSOCKET", path, scope))
            if len(parts) != 4 or parts[:2] != ["api", "runs"] or parts[3] != "ws":
                raise Refused(404, "there is no WebSocket at this address", code=NO_RUN)
            await send({"type": "websocket.accept"})
            is_accepted = True
            client = Client(receive, send, scope["headers"], self._unread)
            hello = await self._hello(client)
            if hello is not None:
                with self._clients.counted(client):
                    commands = Request("POST", f"api/runs/{parts[2]}/commands", scope)
                    await self._serve(parts[2], client, hello, commands)
        except Refused as refused:
            with anyio.move_on_after(_CLOSE_S), contextlib.suppress(OSError, RuntimeError):  # it may have left
                if not is_accepted and "websocket.http.response" in (scope.get("extensions") or {}):
                    await send_denial(send, refused)
                else:
                    reason = refused.reason.encode()[:120].decode(errors="ignore")  # a close frame holds 123 bytes
                    await send({"type": "websocket.close", "code": refused.code, "reason": reason})

    async def _hello(self, client: Client) -> Hello | None:
        """Receive a client's `Hello`; None if it has disconnected. Raises `Refused` without a hello, or its token."""
        hello = None
        with self._clients.expected(client), anyio.move_on_after(HELLO_S) as client.scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._clients.close_with_server)
                hello = await client.receive()
                tasks.cancel_scope.cancel()
        if hello is None:
            if client.has_left:
                return None
            raise client.problem or Refused(408, f"no hello arrived within {HELLO_S:g} s")
        if not isinstance(hello, Hello) or not self._access.allows(hello.token):
            raise Refused(401, "the first message is not a hello with the token", code=NO_TOKEN)
        return hello

    async def _serve(self, run_id: str, client: Client, hello: Hello, commands: Request) -> None:
        """Send frames and receive messages. Raises `Refused` with the code for closing the connection."""
        hub = await self._hub(run_id)

        async def listen() -> None:
            while (message := await client.receive()) is not None:
                if isinstance(message, SnapshotWanted):
                    client.needs_snapshot = True
                elif isinstance(message, CommandSent):
                    answer = await self._command(hub, bytes(message.command), commands)
                    await client.send({"type": "websocket.send", "text": msgspec.json.encode(answer).decode()})
            client.disconnect()

        async with anyio.create_task_group() as tasks:
            client.scope = tasks.cancel_scope
            tasks.start_soon(listen)
            tasks.start_soon(client.disconnect_if_stuck)
            tasks.start_soon(self._clients.close_with_server)
            await send_frames(hub, hello, client, as_text)
            client.disconnect(Refused(503, "the run is over, and its server stops", code=ENDING))
        if client.problem is not None:
            raise client.problem


def _number(query: dict[str, list[str]], name: str) -> int | None:
    return whole_number(query.get(name, [""])[-1])
