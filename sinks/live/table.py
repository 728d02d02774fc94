"""The table of runs for the page: filters of strangers, rows encoded once, and answers that are small without news."""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import re
import secrets
import time
from collections import OrderedDict
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

MAX_VALUES = 400_000
"""Maximum values of metrics, and of hyperparameters, per answer: 16 MB each before they are compressed."""
_MOST_WANTED = 50
"""Maximum metrics that a request may name of a table with more values."""
_MOST_KEPT = 4
"""Maximum selections of metrics whose rows are kept encoded."""


class _EncodedRow(NamedTuple):
    version: int
    """That of the table when the row changed."""
    entry: RunEntry
    data: msgspec.Raw


class TableRows:
    """The encoded rows of a table, by the names of their runs. Each method belongs to one thread at a time.

    Args:
        metrics: The metrics in a row; None for all.
    """

    def __init__(self, metrics: frozenset[str] | None = None) -> None:
        self._metrics = metrics
        self._id = secrets.token_hex(4)
        self._version = 0
        self._rows: dict[str, _EncodedRow] = {}

    def take(self, entries: Sequence[RunEntry], most_config: int) -> None:
        """Encode the rows that have changed since the last call."""
        rows: dict[str, _EncodedRow] = {}
        self._version += 1
        for entry in entries:
            row = self._rows.get(entry.name)
            if row is None or row.entry != entry:
                data = encode(page_row(entry, self._metrics, most_config))
                row = _EncodedRow(self._version, entry, msgspec.Raw(data))
            rows[entry.name] = row
        self._rows = rows

    def known(self, names: Sequence[str]) -> list[str]:
        """Return the names that have a row: another request may have taken newer entries."""
        return [name for name in names if name in self._rows]

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


class TableEndpoints:
    """Answers ``GET /api/table`` and ``GET /api/runs``, and changes notes."""

    def __init__(self, runs: Runs, unread: Unread) -> None:
        self._runs = runs
        self._unread = unread
        self._rows: OrderedDict[frozenset[str] | None, TableRows] = OrderedDict()
        """By the metrics in their rows, the last used ones last."""

    @functools.cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        """One answer at a time; created when it is used, in the server's event loop."""
        return anyio.CapacityLimiter(1)

    @functools.cached_property
    def _searches(self) -> anyio.CapacityLimiter:
        """Slow filters wait for each other, and no answer without a filter waits for them."""
        return anyio.CapacityLimiter(2)

    @functools.cached_property
    def _writes(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(2)

    async def get(self, request: Request, *, commands: bool) -> Response:
        """Return the rows that fulfil ``filter=...``; raises `Refused` for a filter that cannot be read.

        With more than `MAX_VALUES` values of metrics, rows have those by which runs are judged and of ``metric=...``;
        ``metric_names`` are all. ``left_out`` counts the hyperparameters that the rows lack.

        Args:
            commands: Whether the server takes commands, which include notes.
        """
        entries = await self._runs.entries()
        query = request.query_params
        rows, left_out = await anyio.to_thread.run_sync(
            self._take, entries, query.getlist("metric"), limiter=self._limiter
        )
        filters = [one for one in query.getlist("filter") if one.strip()]
        if filters:
            found = await anyio.to_thread.run_sync(_selected, entries, filters, limiter=self._searches)
        else:
            found = [entry.name for entry in entries]
        notes = commands and self._runs.keeps_notes
        state = {"total": len(entries), "is_behind": self._runs.is_behind, "notes": notes, **left_out}

        def answer() -> Response:
            names = rows.known(found)
            etag = rows.tag(names, state)
            if request.headers.get("if-none-match") == etag:
                return BoundedResponse(status_code=304, headers={"etag": etag})
            members = {"now": time.time(), **state, **rows.members(names, query.get("since", ""))}
            return self._answer(request, members, etag=etag)

        return await anyio.to_thread.run_sync(answer, limiter=self._limiter)

    def _take(self, entries: Sequence[RunEntry], wanted: Sequence[str]) -> tuple[TableRows, dict[str, object]]:
        """Encode the rows; of many values only some, and the second result names what the table has in addition."""
        metrics: frozenset[str] | None = None
        left_out: dict[str, object] = {}
        if sum(len(entry.metrics) for entry in entries) > MAX_VALUES:
            monitored = {entry.monitored for entry in entries if entry.monitored is not None}
            metrics = frozenset([*sorted(monitored)[:_MOST_WANTED], *wanted[:_MOST_WANTED]])
            left_out["metric_names"] = Columns(entries).metrics
        most_config = MAX_VALUES // max(1, len(entries))
        if (longest := max((len(entry.config) for entry in entries), default=0)) > most_config:
            left_out["left_out"] = longest - most_config
        rows = self._rows.setdefault(metrics, TableRows(metrics))
        self._rows.move_to_end(metrics)
        if len(self._rows) > _MOST_KEPT:
            self._rows.popitem(last=False)
        rows.take(entries, most_config)
        return rows, left_out

    async def list(self, request: Request, *, commands: bool) -> Response:
        """Return the list of runs in a few words each."""
        members: dict[str, object] = {"runs": await self._runs.summaries(commands)}
        return await anyio.to_thread.run_sync(lambda: self._answer(request, members), limiter=self._limiter)

    def _answer(self, request: Request, members: dict[str, object], **headers: str) -> Response:
        data, more = gzipped(request, encode(members))
        return BoundedResponse(data, headers=headers | more, media_type="application/json", unread=self._unread)

    async def note(self, hub: Hub, body: bytes) -> Response:
        """Change the notes about a run; return all of them. Raises `Refused`."""
        run_dir = hub.run_dir
        if run_dir is None or not self._runs.keeps_notes:
            raise Refused(409, "the folder of this run is not here; note it on the machine that has it")
        try:
            change = msgspec.json.decode(body, type=NotesChange)
            notes = await anyio.to_thread.run_sync(write_notes, run_dir, change, limiter=self._writes)
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
