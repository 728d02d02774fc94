"""The table of runs for the page: filters of strangers, rows encoded once, and answers that are small without news."""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
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
"""Maximum selections of which a row is kept encoded."""


class _Selection(NamedTuple):
    """What rows have of the metrics and the hyperparameters of their runs; None for all."""

    metrics: frozenset[str] | None = None
    most_config: int | None = None


class _SentRow(NamedTuple):
    version: int
    """That of the table when the row changed."""
    entry: RunEntry
    data: dict[_Selection, msgspec.Raw]
    """Encoded, when it was first sent."""


class TableRows:
    """The rows of a table, by the names of their runs. Each method belongs to one thread at a time."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(4)
        self._version = 0
        self._rows: dict[str, _SentRow] = {}

    def take(self, entries: Sequence[RunEntry]) -> None:
        """Note which rows have changed since the last call."""
        rows: dict[str, _SentRow] = {}
        self._version += 1
        for entry in entries:
            row = self._rows.get(entry.name)
            rows[entry.name] = row if row is not None and row.entry == entry else _SentRow(self._version, entry, {})
        self._rows = rows

    def known(self, names: Iterable[str]) -> list[str]:
        """Return the names that have a row: another request may have taken newer entries."""
        return [name for name in names if name in self._rows]

    def tag(self, names: Sequence[str], state: object) -> str:
        """Return an entity tag of some rows as they are, and of ``state``, which the answer also has."""
        content = [self._id, state, *((name, self._rows[name].version) for name in names)]
        return f'W/"{_digest(content)}"'

    def members(self, names: Sequence[str], selection: _Selection, since: str) -> dict[str, object]:
        """Return ``cursor`` and ``rows``; with the cursor of an earlier answer, ``names`` and the rows changed since.

        A cursor of another table, or of another selection, is ignored.
        """
        own = f"{self._id}{_digest([sorted(selection.metrics or ()), selection])[:6]}"
        table, _, number = since.partition("-")
        version = int(number) if table == own and number.isdecimal() and len(number) < 20 else 0
        rows = [self._encoded(self._rows[name], selection) for name in names if self._rows[name].version > version]
        members: dict[str, object] = {"cursor": f"{own}-{self._version}"}
        return members | ({"names": list(names)} if version else {}) | {"rows": rows}

    def _encoded(self, row: _SentRow, selection: _Selection) -> msgspec.Raw:
        data = row.data.get(selection)
        if data is None:
            if len(row.data) >= _MOST_KEPT:
                del row.data[next(iter(row.data))]
            data = row.data[selection] = msgspec.Raw(encode(page_row(row.entry, *selection)))
        return data


def _digest(content: object) -> str:
    return hashlib.blake2b(repr(content).encode("utf-8", "replace"), digest_size=12).hexdigest()


class TableEndpoints:
    """Answers ``GET /api/table`` and ``GET /api/runs``, and changes notes."""

    def __init__(self, runs: Runs, unread: Unread) -> None:
        self._runs = runs
        self._unread = unread
        self._rows = TableRows()

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

        Beyond `MAX_VALUES` values of metrics, the rows have those by which runs are judged and of ``metric=...``;
        ``metric_names`` are all. ``left_out`` counts the hyperparameters that the rows lack.

        Args:
            commands: Whether the server takes commands, which include notes.
        """
        entries = await self._runs.entries()
        query = request.query_params
        await anyio.to_thread.run_sync(self._rows.take, entries, limiter=self._limiter)
        found, filters = entries, [one for one in query.getlist("filter") if one.strip()]
        if filters:
            found = await anyio.to_thread.run_sync(_selected, entries, filters, limiter=self._searches)
        notes = commands and self._runs.keeps_notes
        state = {"total": len(entries), "is_behind": self._runs.is_behind, "notes": notes}

        def answer() -> Response:
            names = self._rows.known(entry.name for entry in found)
            selection, left_out = _selection(found, query.getlist("metric"))
            etag = self._rows.tag(names, [state, left_out, selection])
            if request.headers.get("if-none-match") == etag:
                return BoundedResponse(status_code=304, headers={"etag": etag})
            rows = self._rows.members(names, selection, query.get("since", ""))
            return self._answer(request, {"now": time.time(), **state, **left_out, **rows}, etag=etag)

        return await anyio.to_thread.run_sync(answer, limiter=self._limiter)

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


def _selection(entries: Sequence[RunEntry], wanted: Sequence[str]) -> tuple[_Selection, dict[str, object]]:
    """Return what the rows of some runs have, and the members of the answer that name the rest."""
    metrics, most_config, left_out = None, None, dict[str, object]()
    if sum(len(entry.metrics) for entry in entries) > MAX_VALUES:
        monitored = {entry.monitored for entry in entries if entry.monitored is not None}
        metrics = frozenset([*sorted(monitored)[:_MOST_WANTED], *wanted[:_MOST_WANTED]])
        left_out["metric_names"] = Columns(entries).metrics
    most = MAX_VALUES // max(1, len(entries))
    if (longest := max((len(entry.config) for entry in entries), default=0)) > most:
        most_config, left_out["left_out"] = most, longest - most
    return _Selection(metrics, most_config), left_out


def _selected(entries: Sequence[RunEntry], filters: Sequence[str]) -> list[RunEntry]:
    """Return the runs that fulfil all filters. Raises `Refused`."""
    if sum(map(len, filters)) > MAX_CHARS:
        raise Refused(400, f"the filters have more than {MAX_CHARS:,} characters; shorten them")
    columns = Columns(entries, listed="the page lists them under Columns")
    try:
        return select(entries, filters, columns, _timed(time.monotonic() + _SEARCH_S))
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
