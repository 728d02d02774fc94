"""The ASGI application: the page, the runs, and their events by WebSocket and Server-Sent Events.

It is made of anyio alone, runs under any ASGI server, on asyncio and trio, and may be mounted anywhere in a Starlette,
FastAPI or Litestar application: all its addresses are relative. It needs no lifespan: whoever watches keeps it going,
and it closes its connections itself when the server shuts down (`sinks.live.shutdown`).

========================================  ================================================================
``GET /``                                 the page
``GET /api/runs``                         all runs in a few words
``GET /api/runs/RUN_ID``                  one run as it stands: a snapshot
``GET /api/runs/RUN_ID/events``           the snapshot, then frames, as Server-Sent Events
``WS /api/runs/RUN_ID/ws``                the same, and commands; the first message is the client's ``hello``
``GET /api/runs/RUN_ID/journal``          the events themselves, as JSON lines, from ``?since=SEQ`` on
``POST /api/runs/RUN_ID/commands``        a command
``GET /api/runs/RUN_ID/media/PATH``       an image of the run's folder
========================================  ================================================================
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
import msgspec

from events.errors import ArgumentsError, RunFolderError, WireError
from events.wire import decode_command_json
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
    header_of,
    path_of,
    send_data,
    send_denial,
    send_file,
    send_image,
    send_json,
    send_redirect,
    send_refusal,
    start,
    whole_number,
    without_body,
)
from sinks.live.client import (
    ENDING,
    MOST_INBOUND,
    NO_RUN,
    NO_TOKEN,
    RESTART,
    TOO_SLOW,
    Client,
    CommandSent,
    Hello,
    SnapshotWanted,
)
from sinks.live.frames import Message as Sent
from sinks.live.hub import Hub
from sinks.live.journal_body import JournalBody
from sinks.live.runs import Runs, runs_of
from sinks.live.shutdown import find_servers, unread

_PAGE = Path(__file__).with_name("page")
HELLO_S = 10.0
"""So long who has connected may wait with his hello."""
MOST_STRANGERS = 100
"""So many may be about to say it; then the oldest is let go."""
_CLOSE_S = 5.0
_END_S = 0.5
_LOOK_S = 0.1
"""How often it is looked whether the server shuts down."""
_UNREAD_S = 0.3
"""Seconds that a client may take to read the rest of what it was sent when the server shuts down."""
_RETRY = b"retry: 1000\n"
"""An `EventSource` reconnects after this many milliseconds. A line of the first event: some clients take one alone for
an event."""
MOST_FOLLOWERS = 64
"""Maximum responses with a journal at a time, because each holds a part of it in memory; further ones get 503."""
MOST_IMAGES = 64
"""Maximum responses with an image at a time, because each holds an open file; further ones get 503."""
_JOURNAL_S = 0.05
"""Minimum seconds between two reads of a journal that a client follows; more where many follow."""


class LiveApp:
    """Serves runs to watchers.

    Args:
        runs: Which runs there are: `sinks.live.runs.RunsOfFolder`, or the path of its folder.
        access: Who may see them, and command them.
        most_clients: Connections that stay open at a time; others are asked to come again.

    Raises:
        ArgumentsError: One of them is something else.
    """

    def __init__(self, runs: Runs | str | os.PathLike[str], access: Access, most_clients: int = 1_000) -> None:
        if not isinstance(access, Access):
            raise ArgumentsError(f"access must be Access(...), not {access!r:.80}")
        self._runs = runs_of(runs)
        self._access = access
        self._most_clients = most_clients
        self._clients: set[Client] = set()
        self._most_strangers = min(MOST_STRANGERS, max(1, most_clients // 10))
        self._strangers: dict[Client, None] = {}
        """Those whose hello is awaited, the oldest first: they take no place from who has shown the token."""
        self._most_followers = min(MOST_FOLLOWERS, max(1, most_clients // 4))
        self._followers = 0
        self._most_images = min(MOST_IMAGES, max(1, most_clients // 4))
        self._images = 0
        self._unread = Unread()
        self._folders: anyio.CapacityLimiter
        """Of threads that read below run folders for clients. Shared, and few: journals are decoded and encoded, which
        would take the interpreter from the event loop."""
        self._disk: anyio.CapacityLimiter | None = None
        """Our own, for the page: a disk that hangs must not take the threads of a host."""
        self._looking = anyio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if self._disk is None:  # here, because a limiter belongs to the kind of event loop in which it is made
            self._disk, self._folders = anyio.CapacityLimiter(4), anyio.CapacityLimiter(2)
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case "lifespan":
                await _lifespan(receive, send)

    async def end(self) -> None:
        """Close all connections that stay open; waits until they are closed, half a second at most.

        uvicorn, hypercorn and gunicorn need no call of it: the application sees for itself that they shut down. A host
        with another server calls it when its shutdown begins.
        """
        self._close_all()
        with anyio.move_on_after(_END_S):
            while self._clients or self._strangers:  # noqa: ASYNC110  # each of them ends a task of its server
                await anyio.sleep(0.01)

    def _close_all(self) -> None:
        for client in [*self._clients, *self._strangers]:
            client.leave(Refused(503, "the server shuts down", code=RESTART))

    async def _close_with_server(self) -> None:
        """Close all connections once the server shuts down. Each of them runs this, and one looks for all."""
        if len(self._clients) + len(self._strangers) == 1:  # what was waited on may have been another event loop's
            self._looking = anyio.Lock()
        async with self._looking:
            servers = find_servers()
            while not any(server.is_ending() for server in servers):  # noqa: ASYNC110  # no server has an event for it
                await anyio.sleep(_LOOK_S)
            headers = [client.headers for client in [*self._clients, *self._strangers]]
            self._close_all()
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(_UNREAD_S):
                    while unread(servers, headers):  # noqa: ASYNC110  # no event tells that a client has read
                        await anyio.sleep(0.02)
                for transport in unread(servers, headers):
                    transport.abort()

    # ---------------------------------------------------------------------------------------------- HTTP

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if scope["method"] == "HEAD":
            send = without_body(send)
        try:
            _check_framing(scope)
            is_api = path == "api/runs" or path.startswith("api/runs/")
            is_page = path == "" or path.startswith("page/")
            self._access.check_host(scope)
            # A browser sends an Origin for the page's modules, too, and a proxy may have altered the Host beside it.
            if not is_page:
                self._access.check_origin(scope)
            if "//" in path:  # a check that looks at the path must see the one that is served
                raise Refused(404, "there is nothing at this address; an address has no empty parts")
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
        # A form of another site can send anything but this: the browser would ask us first, and hear no.
        if header_of(scope, b"content-type").partition(b";")[0].strip() != b"application/json":
            raise Refused(415, "a command is application/json")
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
        """Leave a command for the run; returns the answer. The host's check is asked about ``request`` before."""
        try:
            command = decode_command_json(data)
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
        """The events behind a cursor; with ``follow=1`` until the run is over, with an empty line now and then."""
        if hub.run_dir is None:
            raise Refused(404, "this run keeps no journal")
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        since = _number(query, "since") if "since" in query else 0
        if since is None:
            raise Refused(400, "since is the seq of an event, a whole number")
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
        self._followers += 1  # nothing is awaited since it was compared: others would pass meanwhile
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
                event = _as_event(message)
                return {**event, "body": begin.pop() + event["body"]} if begin else event

            await self._watch(hub, hello, client, shape)

        await self._stream(scope, receive, send, b"text/event-stream", write_all)

    async def _stream(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
        kind: bytes,
        write_all: Callable[[Client], Awaitable[None]],
    ) -> None:
        """A response that goes on until it is written, or the client has left."""
        if scope["method"] != "GET":
            raise Refused(405, "this address takes GET", headers=[(b"allow", b"GET")])
        client = Client(receive, send, scope["headers"], self._unread)
        with self._counted(client):
            await send(start(200, kind, [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]))
            async with anyio.create_task_group() as tasks:
                client.scope = tasks.cancel_scope
                tasks.start_soon(client.wait_for_leave)
                tasks.start_soon(client.let_go_if_stuck)
                tasks.start_soon(self._close_with_server)
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
                with self._counted(client):
                    commands = Request("POST", f"api/runs/{parts[2]}/commands", scope)
                    await self._serve(parts[2], client, hello, commands)
        except Refused as refused:
            with anyio.move_on_after(_CLOSE_S), contextlib.suppress(OSError, RuntimeError):  # it may have left
                if not is_accepted and "websocket.http.response" in (scope.get("extensions") or {}):
                    await send_denial(send, refused)
                else:
                    reason = refused.reason.encode()[:120].decode(errors="ignore")  # no more goes into the frame
                    await send({"type": "websocket.close", "code": refused.code, "reason": reason})

    async def _hello(self, client: Client) -> Hello | None:
        """Who it is; None if it has left. Raises `Refused` if it does not say, or has no token."""
        hello = None
        self._strangers[client] = None
        if len(self._strangers) > self._most_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]  # here, so that the next one does not make the same one leave
            oldest.leave(Refused(503, "others have come to say who they are", code=TOO_SLOW))
        try:
            with anyio.move_on_after(HELLO_S) as client.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._close_with_server)
                    hello = await client.take()
                    tasks.cancel_scope.cancel()
        finally:
            self._strangers.pop(client, None)
        if hello is None:
            if client.has_left:
                return None
            raise client.problem or Refused(408, "no hello came")
        if not isinstance(hello, Hello) or not self._access.allows(hello.token):
            raise Refused(401, "the first message is a hello, with the token", code=NO_TOKEN)
        return hello

    async def _serve(self, run_id: str, client: Client, hello: Hello, commands: Request) -> None:
        """Raises `Refused` with the code that the connection is to be closed with."""
        hub = await self._hub(run_id)

        async def listen() -> None:
            while (message := await client.take()) is not None:
                if isinstance(message, SnapshotWanted):
                    client.is_lost = True
                elif isinstance(message, CommandSent):
                    answer = await self._command(hub, bytes(message.command), commands)
                    await client.send({"type": "websocket.send", "text": msgspec.json.encode(answer).decode()})
            client.leave()

        async with anyio.create_task_group() as tasks:
            client.scope = tasks.cancel_scope
            tasks.start_soon(listen)
            tasks.start_soon(client.let_go_if_stuck)
            tasks.start_soon(self._close_with_server)
            await self._watch(hub, hello, client, _as_text)
            client.leave(Refused(503, "the run is over, and its server ends", code=ENDING))
        if client.problem is not None:
            raise client.problem

    # ---------------------------------------------------------------------------------------------- both

    async def _watch(self, hub: Hub, hello: Hello, client: Client, shape: Callable[[Sent | int], Message]) -> None:
        """Send a snapshot where one is needed, then each frame as it comes; until the client leaves, or all is over.

        Args:
            shape: Makes what is sent of a message; or, if frames were missed, of how many.
        """
        await hub.refresh()
        async with anyio.create_task_group() as driving:
            await driving.start(hub.drive)
            number = hub.resume(hello.attempt, hello.since) if hello.since else None
            generation = hub.generation
            while True:
                if number is None or generation != hub.generation or client.takes_snapshot():
                    snapshot = await hub.snapshot()
                    number, generation = snapshot.number + 1, snapshot.generation
                    await client.send(shape(snapshot))
                while hub.newest < number and generation == hub.generation and not hub.is_over:
                    await hub.news.wait()
                if generation != hub.generation:
                    continue
                if number > hub.newest:
                    break
                frame = hub.frame(number)
                if frame is None:
                    await client.send(shape(hub.oldest - number))
                    number = None
                    continue
                await client.send(shape(frame))
                number += 1
            driving.cancel_scope.cancel()

    @contextlib.contextmanager
    def _counted(self, client: Client) -> Iterator[None]:
        if len(self._clients) >= self._most_clients:
            raise Refused(503, f"{len(self._clients)} connections are open: come again later", code=TOO_SLOW)
        self._clients.add(client)
        try:
            yield
        finally:
            self._clients.discard(client)
            client.forget()


def _check_framing(scope: Message) -> None:
    """Refuse a request whose end a proxy may see elsewhere: what follows could be answered as another's request."""
    names = {key.lower() for key, _ in scope["headers"]}
    if {b"transfer-encoding", b"content-length"} <= names:
        raise Refused(400, "a request has one length: Content-Length or chunks", headers=[(b"connection", b"close")])


def _as_text(message: Sent | int) -> Message:
    text = message.text if isinstance(message, Sent) else f'{{"type":"gap","lost":{message}}}'
    return {"type": "websocket.send", "text": text}


def _as_event(message: Sent | int) -> Message:
    data = message.event if isinstance(message, Sent) else b'event: gap\ndata: {"type":"gap","lost":%d}\n\n' % message
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _number(query: dict[str, list[str]], name: str) -> int | None:
    return whole_number(query.get(name, [""])[-1])
