"""The runs that a server shows: one, or those of a folder."""

from __future__ import annotations

import functools
import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread
import msgspec

from events.errors import ArgumentsError
from events.journal.segment import JOURNAL_DIR, segment_name, segment_numbers
from events.run.folder import is_held
from events.run.summary import Summary
from events.safe_files import guard, list_below, stat_below
from sinks.damage import damage_of, reason_of
from sinks.live.folder_hub import FolderHub
from sinks.live.hub import Hub
from sinks.live.summaries import HealthReader, add_damage, named, summarise
from sinks.live.view import damage_line

_MOST_HUBS = 16
"""Maximum hubs without clients that are kept."""
MOST_READERS = 32
"""Maximum threads that read runs for clients."""
_PER_RUN_S = 0.2
"""Maximum seconds per run and look; later looks read the rest of a long journal."""
_FIRST_LOOK_S = 5.0
"""Maximum seconds per look at runs that are not known yet; a later look reads the others."""
_LOOK_S = 0.3
"""Maximum seconds per look at runs that are known."""
MOST_RUNS = 1_000


class Runs(Protocol):
    """Finds runs by their names."""

    async def summaries(self, commands: bool) -> list[Summary]:
        """Return an entry for each run, the newest first."""
        ...

    async def hub(self, run_id: str) -> Hub | None:
        """Return the hub of a run; None without such a run."""
        ...


class OneRun:
    """The run of a sink."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def summaries(self, commands: bool) -> list[Summary]:
        """Return the entry of this run."""
        self._hub.allows_commands = commands
        return [self._hub.summary()]

    async def hub(self, run_id: str) -> Hub | None:
        """Return its hub, if that is its name."""
        return self._hub if run_id == self._hub.view.run.run_id else None


class _Run(msgspec.Struct):
    """One folder, as of the last look."""

    stamp: tuple[int, ...] | None
    held: bool
    reason: str | None
    """The damage outside the journal's content."""
    summary: Summary
    health: HealthReader
    looked_at: float
    """`time.monotonic` of the last look."""


class RunsOfFolder:
    """The runs in the folders of a folder; or the one run whose run folder it is.

    Each request looks at the folder again, so that new runs are found. A run is listed under its ``run_id``. Of several
    folders with one ``run_id`` (copies, for example) the folder of that name keeps it, otherwise the running one, or
    the one with the newest event; the others are listed under the ``run_id`` and their folder's name. A run that cannot
    be read, or whose ``run_id`` is not a printable name, is listed under its folder's name.

    Links in the folder are not followed: a user with write access to it could otherwise expose any folder. A link is
    listed as damaged, unless it points to another entry of the same folder.

    Raises:
        ArgumentsError: ``folder`` is not a path.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise ArgumentsError(f"RunsOfFolder({folder!r:.80}) is not a path; give it the folder of the runs: 'runs'")
        self._folder = Path(os.path.abspath(folder))
        guard(self._folder)
        self._hubs: OrderedDict[Path, FolderHub] = OrderedDict()
        self._known: dict[Path, _Run] = {}
        self._paths: dict[str, tuple[Path, str]] = {}  # by the name in the list; the folder and its run_id
        self._is_behind = False  # the last look has skipped runs that are not known yet
        self._found: tuple[float, list[Summary]] = -math.inf, []  # start and result of the last look

    @functools.cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        """Created when it is used: the server's event loop may be another than the one of the constructor's caller."""
        return anyio.CapacityLimiter(1)

    @functools.cached_property
    def _readers(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(MOST_READERS)

    async def summaries(self, commands: bool) -> list[Summary]:
        """Return the entries of at most the newest thousand runs. Waits for the disk, on a thread."""
        found = sorted(await self._look_again(), key=lambda run: run.started, reverse=True)
        return [msgspec.structs.replace(run, commands=commands and run.status == "running") for run in found]

    async def hub(self, run_id: str) -> Hub | None:
        """Return a run's hub by its name in the list. Waits for the disk, on a thread."""
        there = self._hub_of(run_id)
        if there is None:
            await self._look_again()
            while self._is_behind and run_id not in self._paths:
                await self._look_again()
            there = self._hub_of(run_id)
        if there is None and (known := self._paths.get(run_id)) is not None:
            path, own = known
            there = self._hubs[path] = FolderHub(path, None if own == run_id else run_id, self._readers)
            self._hubs.move_to_end(path)
            self._drop_hubs()
        return there

    def _hub_of(self, run_id: str) -> FolderHub | None:
        """Return the existing hub; None if there is none, or another run has the folder or the name now."""
        path, own = self._paths.get(run_id, (None, ""))
        hub = self._hubs.get(path) if path is not None else None
        name = None if own == run_id else run_id
        if path is None or hub is None or hub.name != name or hub.view.run.run_id not in ("", own):
            return None
        self._hubs.move_to_end(path)
        return hub

    def _drop_hubs(self) -> None:
        for path in list(self._hubs)[: max(0, len(self._hubs) - _MOST_HUBS)]:
            if not self._hubs[path].is_watched:
                del self._hubs[path]

    async def _look_again(self) -> list[Summary]:
        """Look for the runs; requests during a look share the next one."""
        asked = time.monotonic()

        def look() -> list[Summary]:
            began, found = self._found
            if began < asked:
                began = time.monotonic()
                self._found = began, found = began, self._look()
            return found

        return await anyio.to_thread.run_sync(look, limiter=self._limiter)

    def _look(self) -> list[Summary]:
        began = time.monotonic()
        found = _run_folders(self._folder)
        known = {path: self._known[path] for path in found if path in self._known}
        self._is_behind = False
        # The oldest look first, so that slow runs do not starve the others.
        for path in sorted(found, key=lambda path: known[path].looked_at if path in known else -math.inf):
            if time.monotonic() - began > (_LOOK_S if path in known else _FIRST_LOOK_S):
                self._is_behind = self._is_behind or path not in known
            elif (run := self._look_at(path)) is not None:
                known[path] = run
            else:
                known.pop(path, None)
        self._known = known
        self._paths, summaries = named({path: self._with_view(path, run.summary) for path, run in known.items()})
        return summaries

    def _with_view(self, path: Path, summary: Summary) -> Summary:
        """Return a summary with the damage that its hub found in the whole journal."""
        hub = self._hubs.get(path)
        summary = msgspec.structs.replace(summary)
        add_damage(summary, hub.view.run.damage if hub is not None else None)
        return summary

    def _look_at(self, path: Path) -> _Run | None:
        """Look at one run; None if it has not started, or was removed. Never raises for the content of its folder."""
        known = self._known.get(path)
        health = known.health if known is not None else HealthReader(path)
        stamp: tuple[int, ...] | None = None
        held = False
        try:
            reason = damage_of(path)
            stamp = _stamp(path)
            held = is_held(path)
            until = time.monotonic() + _PER_RUN_S
            if known is None or (known.stamp, known.held, known.reason) != (stamp, held, reason):
                summary = summarise(path, health, until)
            else:
                summary = known.summary
                if health.is_behind:
                    damage = [damage_line(summary.damage)] if summary.damage is not None else []
                    summary.problems = [*damage, *health.problems(until)]
        except FileNotFoundError:  # removed
            return None
        except Exception as error:  # of a damaged or hostile folder: other runs are unaffected
            reason, summary = reason_of(error, path), Summary()
        add_damage(summary, reason)
        if not summary.run_id and not summary.damage:
            return None
        return _Run(stamp, held, reason, summary, health, time.monotonic())


def runs_of(given: Runs | str | os.PathLike[str]) -> Runs:
    """Return the runs of a folder if ``given`` is its path, otherwise ``given``.

    Raises:
        ArgumentsError: ``given`` is neither a path nor `Runs`.
    """
    if isinstance(given, str | os.PathLike):
        return RunsOfFolder(given)
    if isinstance(given, type) or not all(callable(getattr(given, name, None)) for name in ("summaries", "hub")):
        raise ArgumentsError(f"runs must be a folder or RunsOfFolder(folder), not {given!r:.80}")
    return given


def _run_folders(folder: Path) -> list[Path]:
    """Return the newest folders with a journal, readable or not, and links, which `guard` refuses."""
    if _has_journal(folder):
        return [folder]
    try:
        entries = list_below(folder, ".")
    except OSError:
        return []
    found: list[tuple[float, Path]] = []
    for entry in entries:
        path = folder / entry.name
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
            if (is_folder and _has_journal(path)) or (entry.is_symlink() and _leads_out(path)):
                found.append((entry.stat(follow_symlinks=False).st_mtime, path))
        except OSError:  # removed
            continue
    return [path for _, path in sorted(found, key=lambda one: one[0], reverse=True)[:MOST_RUNS]]


def _has_journal(path: Path) -> bool:
    try:
        stat_below(path, JOURNAL_DIR)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)  # a folder that cannot be read is listed as damaged
    return True


def _leads_out(link: Path) -> bool:
    """Whether a link points anywhere but to another entry of its folder, which is listed itself."""
    return os.path.dirname(os.path.abspath(link.parent / os.readlink(link))) != str(link.parent)


def _stamp(run_dir: Path) -> tuple[int, ...]:
    """Return a value that changes with the journal's newest segment and its folder."""
    numbers = segment_numbers(run_dir / JOURNAL_DIR)
    folder = stat_below(run_dir, JOURNAL_DIR)
    if not numbers:
        return (folder.st_ctime_ns,)
    newest = stat_below(run_dir, f"{JOURNAL_DIR}/{segment_name(numbers[-1])}")
    return numbers[-1], newest.st_size, newest.st_ctime_ns, folder.st_ctime_ns
