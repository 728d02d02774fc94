"""Receives the runs that `sinks.Push` sends, and keeps each in a run folder: ``FOLDER/PROJECT/RUN``.

=======================================  =================================================================
``GET api/push/PROJECT/events``          ``{"cursor": seq, "newest": line}``: the newest durable event; the sender
                                         takes the place of an earlier one
``POST api/push/PROJECT/events``         lines of a journal behind the cursor; answered when they are durable.
                                         Without lines: the sender is there; with ``end=1``: nothing follows
``PUT api/push/PROJECT/media``           a file, ``path=media/...``, before the event that names it
=======================================  =================================================================

Each has ``run=`` and ``sender=`` in its query, and the project's token as a bearer token. 409: the lines do not follow
the newest event, or another sender has the run; it asks again with GET.

Memory: at most `MOST_REQUESTS` bodies of events, `MOST_BODY_BYTES` each, four of them decoded, and parts of files.
Disk: a limit per project, and none of the last gibibyte.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from events.errors import RunFolderError, SinkMisconfigured
from events.log import in_this_run
from events.run.copy import folder_name
from events.safe_files import UnsafeFile
from events.text import name_problem, plain_text
from sinks.live.access import Refused, Request
from sinks.live.bounds import busy
from sinks.live.pushed import MOST_PROJECT_BYTES, Project, PushedRun
from sinks.live.responses import STALL_S, JsonResponse
from sinks.live.token import check_token_text
from sinks.push.sink import PROJECT

MOST_BODY_BYTES = 4 * 2**20
"""Maximum bytes of events per request."""
MOST_MEDIA_BYTES = 64 * 2**20
"""Maximum bytes per file."""
MOST_REQUESTS = 16
"""Maximum requests at a time; further ones get 503."""
MOST_OPEN = 200
"""Maximum runs that push at a time, because each holds two open files."""
_PART_BYTES = 2**20
_LOOK_S = 1.0
_MEDIA = re.compile(r"media(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,149}){1,3}")
T = TypeVar("T")
_SENDER = re.compile(r"[0-9a-f]{16}")


class Pushes:
    """The runs of several projects, each with its token.

    Args:
        folder: Receives a folder per project.
        tokens: The token of each project.
        most_bytes: Maximum bytes on disk per project.

    Raises:
        SinkMisconfigured: A name or a token is not valid.
    """

    def __init__(self, folder: Path, tokens: Mapping[str, str], most_bytes: int = MOST_PROJECT_BYTES) -> None:
        self._projects: dict[str, Project] = {}
        for name, token in tokens.items():
            if not PROJECT.fullmatch(name):
                raise SinkMisconfigured(f"{name!r:.80} is not a project; give at most 64 letters, digits, - and _")
            try:
                check_token_text(token)
            except SinkMisconfigured as error:
                raise SinkMisconfigured(f"project {name}: {error}") from None
            self._projects[name] = Project(folder / name, token, most_bytes)
        self._runs: dict[tuple[str, str], PushedRun] = {}  # those whose senders are there
        self._lock = threading.Lock()  # around it; held for no disk
        self._is_watching = False
        self._requests = 0
        self.routes = [
            Route("/api/push/{project}/events", self._newest, methods=["GET"]),
            Route("/api/push/{project}/events", self._events, methods=["POST"]),
            Route("/api/push/{project}/media", self._media, methods=["PUT"]),
        ]

    @cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        """Our own, because a slow disk must not occupy the host's threads; created in the server's event loop."""
        return anyio.CapacityLimiter(4)

    def check_token(self, request: Request) -> None:
        """Raise `Refused` for a request without the token of its project, whether the project exists or not."""
        project = self._projects.get(request.path.split("/")[2])
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        shown = token.strip().encode("utf-8", "surrogatepass") if scheme.lower() == "bearer" else b""
        known = project.token if project is not None else b"\0"
        if not hmac.compare_digest(shown, known) or project is None:
            raise Refused(401, "this is not the project's token", headers={"www-authenticate": "Bearer"})

    def close(self) -> None:
        """Release all folders. Any thread."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs.clear()
        for run in runs:
            run.release()

    # ------------------------------------------------------------------------------------------ endpoints

    async def _newest(self, request: HttpRequest) -> Response:
        with self._counted(request) as (_, run, sender):
            return JsonResponse(await self._on_thread(partial(run.take_over, sender)))

    async def _events(self, request: HttpRequest) -> Response:
        with self._counted(request) as (project, run, sender):
            size = _length(request, MOST_BODY_BYTES)
            body = bytearray()
            async for part in _parts(request):
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise Refused(413, f"a request has at most {MOST_BODY_BYTES:,} bytes of events")
            if size:
                await self._on_thread(partial(project.reserve, size, run.path))
            ends = request.query_params.get("end") == "1"
            cursor = await self._on_thread(partial(run.write, sender, bytes(body), ends))
            return JsonResponse({"cursor": cursor})

    async def _media(self, request: HttpRequest) -> Response:
        path = request.query_params.get("path", "")
        if not _MEDIA.fullmatch(path):
            raise Refused(400, "path is not that of a file in media/")
        with self._counted(request) as (project, run, sender):
            size = _length(request, MOST_MEDIA_BYTES)
            await self._on_thread(partial(project.reserve, size, run.path))
            # On the disk that has room for it; the system's temporary folder may be in memory.
            with await self._on_thread(lambda: tempfile.TemporaryFile(dir=project.folder)) as file:
                received, pending = 0, bytearray()
                async for part in _parts(request):
                    received += len(part)
                    if received > size:
                        raise Refused(400, "the body is longer than its Content-Length")
                    pending += part
                    if len(pending) >= _PART_BYTES:
                        await self._on_thread(partial(file.write, bytes(pending)))
                        pending.clear()
                await self._on_thread(partial(file.write, bytes(pending)))
                await self._on_thread(partial(run.keep, sender, path, file))
            return JsonResponse({})

    @contextlib.contextmanager
    def _counted(self, request: HttpRequest) -> Iterator[tuple[Project, PushedRun, str]]:
        """Count a request while it is handled; yields its project, run and sender. Raises `Refused`."""
        name = request.path_params["project"]
        project = self._projects[name]
        project.count_request()
        run_id, sender = request.query_params.get("run", ""), request.query_params.get("sender", "")
        if (problem := name_problem(run_id)) is not None:
            raise Refused(400, f"run {plain_text(run_id, 80)!r} {problem}")
        if not _SENDER.fullmatch(sender):
            raise Refused(400, "sender is not 16 hexadecimal digits")
        if self._requests >= MOST_REQUESTS:
            raise busy(f"{self._requests} runs push at this moment, the maximum; try again later")
        with self._lock:
            run = self._runs.get((name, run_id))
            if run is None:
                if len(self._runs) >= MOST_OPEN:
                    raise busy(f"{MOST_OPEN} runs push here, the maximum; try again later")
                run = self._runs[name, run_id] = PushedRun(project.folder / folder_name(run_id), run_id)
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=in_this_run(self._watch), name="stagecast-pushes", daemon=True).start()
            run.requests += 1
            self._requests += 1
        try:
            yield project, run, sender
        finally:
            with self._lock:
                run.heard_at = time.monotonic()
                run.requests -= 1
                self._requests -= 1

    def _watch(self) -> None:
        """Release the runs whose senders are silent, on a thread that ends with the last of them."""
        while True:
            time.sleep(_LOOK_S)
            with self._lock:
                quiet = {name: run for name, run in self._runs.items() if run.is_quiet}
                for name in quiet:
                    del self._runs[name]
                self._is_watching = bool(self._runs)
            for run in quiet.values():
                run.release()
            if not self._is_watching:
                return

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """Run blocking work on a thread; a refusing disk is a refusal of the request."""
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._threads)
        except UnsafeFile as error:
            raise Refused(400, f"the run folder cannot be used: {error.strerror}") from None
        except RunFolderError as error:
            raise busy(str(error)) from None
        except OSError as error:
            raise Refused(507, f"the disk refuses: {error.strerror}", headers={"retry-after": "5"}) from None


def _length(request: HttpRequest, most: int) -> int:
    """Return the Content-Length of a request. Raises `Refused` without one, and for one that is too long."""
    text = request.headers.get("content-length", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise Refused(411, "the request has no Content-Length; send one instead of chunks")
    if int(text) > most:
        raise Refused(413, f"the request has {int(text):,} bytes, and the server takes {most:,}")
    return int(text)


async def _parts(request: HttpRequest) -> AsyncIterator[bytes]:
    """Yield the body of a request. Raises `Refused` if the client stops sending it."""
    parts = request.stream()
    while True:
        part: bytes | None = None
        with anyio.move_on_after(STALL_S) as waiting:
            part = await anext(parts, None)
        if waiting.cancelled_caught:
            raise Refused(408, "the body has not arrived in time")
        if part is None:
            return
        yield part
