"""Which runs there are to watch: one, or those of a folder."""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import anyio
import anyio.to_thread
import msgspec

from events.errors import ArgumentsError
from events.folder import is_held
from events.health import Health
from events.journal_reader import JOURNAL_DIR, EventFinder, JournalReader, last_events, segment_numbers
from events.messages import Event, RunEnded
from sinks.live.hub import FolderHub, Hub
from sinks.live.stored import head_of
from sinks.live.view import RunView, Summary

_MOST_HUBS = 16
"""Hubs that are kept though nobody watches them."""
_HEAD = 64
MOST_RUNS = 1_000


class Runs(Protocol):
    """Finds runs by their names."""

    async def summaries(self, commands: bool) -> list[dict[str, Any]]:
        """All of them in a few words, the newest first."""
        ...

    async def hub(self, run_id: str) -> Hub | None:
        """What watchers of a run share; None if there is no such run."""
        ...


class OneRun:
    """The run that a sink belongs to."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def summaries(self, commands: bool) -> list[dict[str, Any]]:
        """Of this run alone."""
        self._hub.allows_commands = commands
        return [self._hub.summary()]

    async def hub(self, run_id: str) -> Hub | None:
        """The run's, if that is its name."""
        return self._hub if run_id == self._hub.view.run.run_id else None


class RunsOfFolder:
    """The runs in a folder, each in one of its own; or the run whose folder it is.

    They are looked for anew each time, so that runs which begin later are found. Of several with the same name (copies,
    say) it is the one that is running, or that told something last.

    Raises:
        ArgumentsError: ``folder`` is not a path.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise ArgumentsError(f"RunsOfFolder({folder!r:.80}) is not a path; give it the folder of the runs: 'runs'")
        self._folder = Path(folder)
        self._hubs: OrderedDict[Path, FolderHub] = OrderedDict()
        self._known: dict[Path, tuple[tuple[int, int], Summary, HealthReader]] = {}
        self._paths: dict[str, Path] = {}  # by the run's name, as of the last look
        self._limiter: anyio.CapacityLimiter | None = None
        self._found: tuple[float, list[Summary]] = -math.inf, []  # by the last look, and when that began

    async def summaries(self, commands: bool) -> list[dict[str, Any]]:
        """Of all runs, at most the newest thousand. Waits for the disk, on a thread."""
        found = await self._look_again()
        shown = []
        for run in sorted(found, key=lambda run: run.started, reverse=True):
            shown.append(msgspec.structs.asdict(run) | {"commands": commands and run.status == "running"})
        return shown

    async def hub(self, run_id: str) -> Hub | None:
        """Of a run by its name. Waits for the disk, on a thread."""
        there = self._hub_of(run_id)
        if there is None:
            await self._look_again()
            there = self._hub_of(run_id)
        if there is None and (path := self._paths.get(run_id)) is not None:
            there = self._hubs[path] = FolderHub(path)  # none yet, or another run had the folder
            self._hubs.move_to_end(path)
            self._let_go()
        return there

    def _hub_of(self, run_id: str) -> FolderHub | None:
        path = self._paths.get(run_id)
        hub = self._hubs.get(path) if path is not None else None
        if path is None or hub is None or hub.view.run.run_id not in ("", run_id):
            return None
        self._hubs.move_to_end(path)
        return hub

    def _let_go(self) -> None:
        for path in list(self._hubs)[: max(0, len(self._hubs) - _MOST_HUBS)]:
            if not self._hubs[path].is_watched:
                del self._hubs[path]

    async def _look_again(self) -> list[Summary]:
        """Look for the runs; those who ask while one looks share the next look, however many they are."""
        asked = time.monotonic()

        def look() -> list[Summary]:
            began, found = self._found
            if began < asked:
                began = time.monotonic()
                self._found = began, found = began, self._look()
            return found

        found: list[Summary] = await self._in_thread(look)
        return found

    async def _in_thread(self, function: Any) -> Any:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(function, limiter=self._limiter)

    def _look(self) -> list[Summary]:
        known: dict[Path, tuple[tuple[int, int], Summary, HealthReader]] = {}
        for path in _run_folders(self._folder):
            try:
                stamp = _stamp(path)
                entry = self._known.get(path)
                if entry is None or entry[0] != stamp or entry[1].status in ("running", "lost"):
                    health = entry[2] if entry is not None else HealthReader(path)
                    entry = stamp, summarise(path, health), health
            except OSError:  # it has been removed since, or cannot be read
                continue
            known[path] = entry
        named = [(path, run) for path, (_, run, _) in known.items() if run.run_id]
        named.sort(key=lambda one: (one[1].status == "running", one[1].updated))
        self._known, self._paths = known, {run.run_id: path for path, run in named}  # the last of a name stays
        return [known[path][1] for path in self._paths.values()]


class HealthReader:
    """Reads what is unhealthy about a run from all of its journal, which may grow. Belongs to one thread."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._head: bytes | None = None

    def problems(self) -> list[str]:
        """Read on, and return what is unhealthy. Raises `OSError`."""
        head = head_of(self._run_dir)
        if head != self._head:  # the first time, or another run has the folder now
            self._head, self._health = head, Health()
            self._finder = EventFinder(self._run_dir / JOURNAL_DIR, self._health.types)
        for event in self._finder.find():
            self._health.add(event)
        return self._health.problems


def runs_of(given: Runs | str | os.PathLike[str]) -> Runs:
    """Runs as they are, or those of a folder that is given by its path.

    Raises:
        ArgumentsError: It is neither.
    """
    if isinstance(given, str | os.PathLike):
        return RunsOfFolder(given)
    if isinstance(given, type) or not all(callable(getattr(given, name, None)) for name in ("summaries", "hub")):
        raise ArgumentsError(f"runs must be a folder or RunsOfFolder(folder), not {given!r:.80}")
    return given


def summarise(run_dir: str | os.PathLike[str], health: HealthReader | None = None) -> Summary:
    """A run in a few words, from the beginning and the end of its journal. Raises `OSError`.

    Args:
        health: Has read the run's journal before; None reads all of it.
    """
    run_dir = Path(run_dir)
    journal_dir = run_dir / JOURNAL_DIR
    events: list[Event] = JournalReader(journal_dir).read(_HEAD)
    tail = last_events(journal_dir)
    view = RunView()
    view.add([*events, *(event for event in tail if events and event.seq > events[-1].seq)])
    if tail and tail[-1].attempt > view.run.attempt:  # its beginning is in the middle
        view.run.attempt = tail[-1].attempt
        end = next((event for event in tail if type(event) is RunEnded), None)
        view.run.status, view.run.ended = ("running", None) if end is None else (end.status, end.time)
    if view.run.status in ("running", "unknown") and not is_held(run_dir):
        view.run.status = "lost"
    view.run.problems = (health or HealthReader(run_dir)).problems()
    return view.run


def _run_folders(folder: Path) -> list[Path]:
    if (folder / JOURNAL_DIR).is_dir():
        return [folder]
    try:
        with os.scandir(folder) as entries:
            paths = [Path(entry.path) for entry in entries if entry.is_dir()]
        runs = [path for path in paths if (path / JOURNAL_DIR).is_dir()]
    except OSError:
        return []
    return sorted(runs, key=_changed, reverse=True)[:MOST_RUNS]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _stamp(run_dir: Path) -> tuple[int, int]:
    """Changes when the journal grows."""
    numbers = segment_numbers(run_dir / JOURNAL_DIR)
    if not numbers:
        return 0, 0
    return numbers[-1], os.stat(run_dir / JOURNAL_DIR / f"{numbers[-1]:020d}.jsonl").st_size
