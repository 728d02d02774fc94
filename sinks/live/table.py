"""The table of runs for the page: filters of strangers, rows encoded once, and answers that are small without news."""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import anyio
import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from events.errors import ArgumentsError, RunFolderError
from events.table.columns import Columns, page_row
from events.table.conditions import MAX_CHARS, Search, select
from events.table.entry import RunEntry
from events.table.notes import NotesChange, write_notes
from sinks.live.access import Refused
from sinks.live.bounds import Unread
from sinks.live.frames import encode
from sinks.live.hub import Hub
from sinks.live.responses import BoundedResponse, JsonResponse, gzipped
from sinks.live.runs import Runs

_SEARCH_S = 1.0
"""Maximum seconds for which the filters of a request may search; a thread does it, without the interpreter lock."""

_MOST_REPEATS = 10_000
"""Maximum product of the counts in a regular expression: its compiler writes repeated characters out."""
_COUNT = re.compile(r"\{(\d+)")
_VERBOSE = re.compile(r"\(\?[a-zA-Z0-9]*x")


class _EncodedRow(NamedTuple):
    version: int
    """That of the table when the row changed."""
    entry: RunEntry
    data: msgspec.Raw


class TableRows:
    """The encoded rows of a table, by the names of their runs. Each method belongs to one thread at a time."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(4)
        self._version = 0
        self._rows: dict[str, _EncodedRow] = {}

    def take(self, entries: Sequence[RunEntry]) -> None:
        """Encode the rows that have changed since the last call."""
        rows: dict[str, _EncodedRow] = {}
        self._version += 1
        for entry in entries:
            row = self._rows.get(entry.name)
            if row is None or row.entry != entry:
                row = _EncodedRow(self._version, entry, msgspec.Raw(encode(page_row(entry))))
            rows[entry.name] = row
        self._rows = rows

    def tag(self, names: Sequence[str], state: object) -> str:
        """Return an entity tag of some rows as they are, and of ``state``, which the answer also has."""
        content = [self._id, state, *((name, self._rows[name].version) for name in names)]
        return f'W/"{hashlib.blake2b(repr(content).encode("utf-8", "replace"), digest_size=12).hexdigest()}"'

    def members(self, names: Sequence[str], since: str) -> dict[str, object]:
        """Return ``cursor`` and ``rows``; with the cursor of an earlier answer, ``names`` and the rows changed since.

        A cursor of another table is ignored.
        """
        table, _, number = since.partition("-")
        version = int(number) if table == self._id and number.isdecimal() and len(number) < 20 else 0
        rows = [self._rows[name] for name in names]
        members: dict[str, object] = {"cursor": f"{self._id}-{self._version}"}
        if version:
            members["names"] = list(names)
        return members | {"rows": [row.data for row in rows if row.version > version]}


class TableEndpoint:
    """Answers ``GET /api/table``, and changes notes."""

    def __init__(self, runs: Runs, unread: Unread) -> None:
        self._runs = runs
        self._unread = unread
        self._rows = TableRows()

    @functools.cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        """One table at a time; created when it is used, in the server's event loop."""
        return anyio.CapacityLimiter(1)

    async def get(self, request: Request, *, commands: bool) -> Response:
        """Return the rows that fulfil ``filter=...``; raises `Refused` for a filter that cannot be read.

        Args:
            commands: Whether the server takes commands, which include notes.
        """
        entries = await self._runs.entries()
        notes = commands and self._runs.keeps_notes
        state = {"total": len(entries), "is_behind": self._runs.is_behind, "notes": notes}
        query = request.query_params

        def answer() -> Response:
            names = _selected(entries, query.getlist("filter"))
            self._rows.take(entries)
            etag = self._rows.tag(names, state)
            if request.headers.get("if-none-match") == etag:
                return BoundedResponse(status_code=304, headers={"etag": etag})
            members = {"now": time.time(), **state, **self._rows.members(names, query.get("since", ""))}
            data, headers = gzipped(request, encode(members))
            return BoundedResponse(
                data, headers={"etag": etag, **headers}, media_type="application/json", unread=self._unread
            )

        return await anyio.to_thread.run_sync(answer, limiter=self._limiter)

    async def note(self, hub: Hub, body: bytes) -> Response:
        """Change the notes about a run; return all of them. Raises `Refused`."""
        run_dir = hub.run_dir
        if run_dir is None or not self._runs.keeps_notes:
            raise Refused(409, "the folder of this run is not here; note it on the machine that has it")
        try:
            change = msgspec.json.decode(body, type=NotesChange)
            notes = await anyio.to_thread.run_sync(write_notes, run_dir, change, limiter=self._limiter)
            return JsonResponse(msgspec.structs.asdict(notes))
        except (msgspec.DecodeError, ArgumentsError, RecursionError) as error:
            raise Refused(400, str(error)) from None
        except (RunFolderError, OSError, ValueError) as error:
            raise Refused(409, f"the notes cannot be written: {error}") from None


def _selected(entries: Sequence[RunEntry], filters: Sequence[str]) -> list[str]:
    """Return the names of the runs that fulfil all filters. Raises `Refused`."""
    if sum(map(len, filters)) > MAX_CHARS:
        raise Refused(400, f"the filters have more than {MAX_CHARS:,} characters; shorten them")
    columns = Columns(entries, listed="the page lists them under Columns")
    try:
        return [entry.name for entry in select(entries, filters, columns, _timed(time.monotonic() + _SEARCH_S))]
    except ArgumentsError as error:
        raise Refused(400, str(error)) from None


def _timed(until: float) -> Callable[[str], Search]:
    """Return a compiler of regular expressions whose searches end by a time (`time.monotonic`)."""

    def search_of(pattern: str) -> Search:
        try:
            regex = importlib.import_module("regex")
        except ModuleNotFoundError:
            raise Refused(501, "filters need the package regex on the server: pip install 'stagecast[live]'") from None
        if math.prod(max(1, int(count[:9])) for count in _COUNT.findall(pattern)) > _MOST_REPEATS:
            raise ArgumentsError(f"{pattern!r:.100} repeats more than {_MOST_REPEATS:,} times; use smaller counts")
        if _VERBOSE.search(pattern):  # which allows spaces and comments in a count
            raise ArgumentsError(f"{pattern!r:.100} has the flag x; write the pattern without it")
        try:
            compiled = regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError, ValueError) as error:
            raise ArgumentsError(f"{pattern!r:.100} is not a regular expression: {error}") from None

        def search(text: str) -> object:
            try:
                found: object = compiled.search(text, timeout=max(0.001, until - time.monotonic()), concurrent=True)
                return found
            except TimeoutError:
                reason = f"takes more than {_SEARCH_S:g} s to search; write it without a repeat in a repeat"
                raise ArgumentsError(f"{pattern!r:.100} {reason}") from None

        return search

    return search_of
