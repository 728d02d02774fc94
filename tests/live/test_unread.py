"""Answers that clients do not read: each holds little memory, all together are bounded, and each times out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import trio.testing
from live.kit import IMAGE, Story, Told, hub_of

from sinks.live import responses as responses_module
from sinks.live.access import Access, Refused
from sinks.live.app import LiveApp
from sinks.live.bounds import PART_BYTES, Unread
from sinks.live.hub import Hub
from sinks.live.responses import STALL_S, BoundedResponse, ResponseAborted
from sinks.live.runs import OneRun, RunsOfFolder

SIZE = 60 * 2**20


class Reader:
    """A client of the application, without a server: it reads its answer when the test allows that."""

    def __init__(self, path: str, method: str = "GET", **headers: str) -> None:
        kind = "websocket" if path.endswith("/ws") else "http"
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": kind, "method": method, "path": f"/{path}", "headers": given, "query_string": b""}
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.messages: list[Any] = []
        self.is_complete = False
        self.is_over = anyio.Event()
        self.reads = anyio.Event()
        self.has_left = anyio.Event()
        self.began = anyio.Event()
        """Set when it was sent a part that it does not read."""
        self._said = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": '{"type":"hello"}'}]

    async def run(self, app: LiveApp) -> None:
        try:
            await app(self.scope, self._receive, self._send)
        finally:
            self.is_over.set()
            self.began.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    async def _receive(self) -> Any:
        if self.scope["type"] == "websocket" and self._said:
            return self._said.pop(0)
        await self.has_left.wait()
        return {"type": "http.disconnect" if self.scope["type"] == "http" else "websocket.disconnect"}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        elif message["type"] in ("http.response.body", "websocket.send"):
            self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if len(message.get("body") or message.get("text") or "") > 2**12:
                self.began.set()
                await self.reads.wait()


@pytest.fixture
def folder(told: Told) -> Path:
    """A run with a large image."""
    told.start(3)
    (told.path / "media").mkdir()
    with open(told.path / "media" / "a.png", "wb") as file:
        file.write(IMAGE)
        file.truncate(SIZE)
    return told.path


@contextlib.asynccontextmanager
async def reading(app: LiveApp, *readers: Reader) -> AsyncIterator[None]:
    """Clients whose answers have started, or are over."""
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for reader in readers:
                tasks.start_soon(reader.run, app)
            for reader in readers:
                await reader.began.wait()
            yield
            for reader in readers:
                reader.has_left.set()
                reader.reads.set()


@pytest.mark.anyio
async def test_images_that_are_not_read_hold_a_part_each(folder: Path) -> None:
    """Beyond the maximum, clients are refused; one that reads gets everything; one that leaves makes room."""
    app = LiveApp(RunsOfFolder(folder.parent), Access())
    app._images.most = 8
    path = "api/runs/demo/media/a.png"
    readers = [Reader(path) for _ in range(8)]
    async with reading(app, *readers):
        assert {reader.status for reader in readers} == {200}
        assert [len(reader.body) for reader in readers] == [PART_BYTES] * 8
        async with reading(app, more := Reader(path), page := Reader("page/live.js"), run := Reader("api/runs/demo")):
            pass
        assert (more.status, more.headers[b"retry-after"]) == (503, b"5")
        assert msgspec.json.decode(more.body)["error"] == "8 clients read images, the maximum; try again later"
        assert (page.status, page.is_complete, run.status, run.is_complete) == (200, True, 200, True)
        readers[0].reads.set()
        await readers[0].is_over.wait()
        assert readers[0].body == (folder / "media" / "a.png").read_bytes()
        readers[1].has_left.set()
        await readers[1].is_over.wait()
        assert len(readers[1].body) == PART_BYTES
    assert app._images.count == 0


@pytest.mark.anyio
async def test_headers_and_conditions_are_answered_without_the_file(folder: Path) -> None:
    """``HEAD`` has the headers of ``GET``; a range is ignored."""
    app = LiveApp(RunsOfFolder(folder.parent), Access())
    path = "api/runs/demo/media/a.png"
    async with reading(app, head := Reader(path, "HEAD")):
        pass
    assert (head.status, head.headers[b"content-length"], head.body) == (200, b"%d" % SIZE, b"")
    async with reading(app, same := Reader(path, if_none_match=head.headers[b"etag"].decode())):
        pass
    assert (same.status, same.body, b"content-length" in same.headers) == (304, b"", False)
    async with reading(app, part := Reader(path, range="bytes=0-9, -1, 5-99999999999999999999, 3-2")):
        pass
    assert (part.status, part.headers[b"content-length"]) == (200, b"%d" % SIZE)


@pytest.mark.anyio
async def test_an_image_that_shrinks_meanwhile_is_not_completed(folder: Path) -> None:
    """Its connection is closed, so that the client notices."""
    app = LiveApp(RunsOfFolder(folder.parent), Access())
    reader = Reader("api/runs/demo/media/a.png")
    async with reading(app, reader):
        (folder / "media" / "a.png").write_bytes(IMAGE)
        reader.reads.set()
        await reader.is_over.wait()
    assert not reader.is_complete


@pytest.fixture
def large(story: Story) -> Hub:
    """A hub with a snapshot and a summary larger than a part."""
    hub = hub_of(story, 3_000)
    hub.view.run.problems = ["p" * 100_000]
    return hub


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["api/runs", "api/runs/demo", "api/runs/demo/events", "api/runs/demo/ws"])
async def test_answers_from_memory_are_bounded_together(large: Hub, path: str) -> None:
    """Beyond the bound, requests are refused until others have ended."""
    app = LiveApp(OneRun(large), Access())
    app._unread = app._table._unread = Unread(most_bytes=2**20)
    readers = [Reader(path) for _ in range(20)]
    async with reading(app, *readers):
        kept = [reader for reader in readers if reader.messages and not reader.is_over.is_set()]
        assert 0 < app._unread._bytes <= 2**20
        assert 0 < len(kept) < 11
        assert all(len(message.get("body", b"")) <= PART_BYTES for one in readers for message in one.messages)
        refused = [reader for reader in readers if reader not in kept]
        if path.endswith("/ws"):
            assert {one.messages[-1]["code"] for one in refused} == {1013}
        elif not path.endswith("/events"):
            assert {(one.status, one.headers[b"retry-after"]) for one in refused} == {(503, b"5")}
    assert app._unread._bytes == 0
    async with reading(app, again := Reader(path)):
        assert not again.is_over.is_set()


@pytest.mark.parametrize(
    ("part_s", "is_sent"),
    [(STALL_S / 5, True), (STALL_S - 1, False), (STALL_S + 1, False)],
    ids=["in time", "too slow in all", "stalled"],
)
def test_the_timeout_of_an_answer_restarts_with_each_part(part_s: float, is_sent: bool) -> None:
    """A client that reads less than the minimum rate is disconnected all the same."""

    async def send(message: Any) -> None:
        if message.get("body"):
            await anyio.sleep(part_s)

    async def answer() -> None:
        with contextlib.nullcontext() if is_sent else pytest.raises(ResponseAborted):
            large = BoundedResponse(b"x" * (10 * PART_BYTES))
            await large({"type": "http", "method": "GET"}, anyio.sleep_forever, send)

    trio.run(answer, clock=trio.testing.MockClock(autojump_threshold=0))


def test_one_answer_is_always_allowed() -> None:
    """However large."""
    unread = Unread(most_bytes=10)
    with unread.holding(10 * PART_BYTES):
        with pytest.raises(Refused), unread.holding(PART_BYTES + 1):
            pass
        with unread.holding(PART_BYTES):  # as small as a connection's own buffer
            pass
    assert unread._bytes == 0


@pytest.mark.anyio
async def test_an_answer_that_is_not_read_times_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application returns without completing it, so that every server closes the connection."""
    monkeypatch.setattr(responses_module, "STALL_S", 0.05)
    app = LiveApp(RunsOfFolder(folder.parent), Access())
    reader = Reader("api/runs/demo/media/a.png")
    async with reading(app, reader):
        await reader.is_over.wait()
    assert (reader.status, reader.is_complete) == (200, False)
