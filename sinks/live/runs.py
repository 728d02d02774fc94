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
from events.run.damage import add_damage
from events.run.summary import Summary
from events.table.entry import RunEntry
from events.table.table import RunTable
from sinks.live.folder_hub import FolderHub
from sinks.live.hub import Hub

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

_FEW = 200
"""Maximum runs that are all looked at for each request; with more..."""
_ENDED_LOOK_S = 0.004
"""...these seconds per run pass between two looks at a run that is over, so that polls cost little."""


class Runs(Protocol):
    """Finds runs by their names."""

    async def summaries(self, commands: bool) -> list[Summary]:
        """Return an entry for each run, the newest first."""
        ...

    async def entries(self) -> list[RunEntry]:
        """Return a row of the table for each run, the newest first."""
        ...

    @property
    def is_behind(self) -> bool:
        """Whether the last entries lack runs, or values of long journals, which a later call has."""
        ...

    @property
    def keeps_notes(self) -> bool:
        """Whether people may note something about a run in its folder."""
        ...

    async def hub(self, run_id: str) -> Hub | None:
        """Return the hub of a run; None without such a run."""
        ...


class OneRun:
    """The run of a sink."""

    is_behind = False

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    @functools.cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(1)

    @property
    def keeps_notes(self) -> bool:
        """Whether the run has a folder."""
        return self._hub.run_dir is not None

    async def summaries(self, commands: bool) -> list[Summary]:
        """Return the entry of this run."""
        self._hub.allows_commands = commands
        notes = await anyio.to_thread.run_sync(self._hub.notes, limiter=self._limiter)
        return [msgspec.structs.replace(self._hub.summary(), label=notes.name, colour=notes.colour)]

    async def entries(self) -> list[RunEntry]:
        """Return its entry, from its curves in memory: the journal would have to be read. On a thread."""
        return [await anyio.to_thread.run_sync(self._hub.entry, limiter=self._limiter)]

    async def hub(self, run_id: str) -> Hub | None:
        """Return its hub, if that is its name."""
        return self._hub if run_id == self._hub.view.run.run_id else None


class RunsOfFolder:
    """The runs in the folders of a folder; or the one run whose run folder it is.

    Each request looks at the folder again, so that new runs are found, at any depth. A run is listed under its
    ``run_id``, unless another has it or it is not a printable name (`events.table.folders.name_runs`). Links in the
    folder are not followed (`events.table.table.RunTable`).

    Args:
        folder: It may not exist yet.
        keeps_notes: Whether people may note something about a run; not in a folder of copies.

    Raises:
        ArgumentsError: ``folder`` is not a path.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keeps_notes: bool = True) -> None:
        self.keeps_notes = keeps_notes
        if not isinstance(folder, str | os.PathLike):
            raise ArgumentsError(f"RunsOfFolder({folder!r:.80}) is not a path; give it the folder of the runs: 'runs'")
        self._table = RunTable(folder)
        self._hubs: OrderedDict[Path, FolderHub] = OrderedDict()
        self._found: tuple[float, list[RunEntry]] = -math.inf, []  # start and result of the last look

    @functools.cached_property
    def _limiter(self) -> anyio.CapacityLimiter:
        """Created when it is used: the server's event loop may be another than the one of the constructor's caller."""
        return anyio.CapacityLimiter(1)

    @functools.cached_property
    def _readers(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(MOST_READERS)

    async def summaries(self, commands: bool) -> list[Summary]:
        """Return the runs, the newest first. Waits for the disk, on a thread."""
        found = [entry.run for entry in await self.entries()]
        may = {run.run_id for run in found if commands and run.status == "running" and not run.pushed}
        return [msgspec.structs.replace(run, commands=run.run_id in may) for run in found]

    async def entries(self) -> list[RunEntry]:
        """Return the entries of the runs, the newest first. Waits for the disk, on a thread."""
        return await self._look_again()

    @property
    def is_behind(self) -> bool:
        """Whether the last look has skipped new runs, or parts of long journals, which a later one reads."""
        return self._table.is_behind or self._table.is_reading

    async def hub(self, run_id: str) -> Hub | None:
        """Return a run's hub by its name in the list. Waits for the disk, on a thread."""
        there = self._hub_of(run_id)
        if there is None:
            await self._look_again()
            while self._table.is_behind and run_id not in self._table.found:
                await self._look_again()
            there = self._hub_of(run_id)
        if there is None and (known := self._table.found.get(run_id)) is not None:
            path, own = known
            there = self._hubs[path] = FolderHub(path, None if own == run_id else run_id, self._readers)
            self._hubs.move_to_end(path)
            self._drop_hubs()
        return there

    def _hub_of(self, run_id: str) -> FolderHub | None:
        """Return the existing hub; None if there is none, or another run has the folder or the name now."""
        path, own = self._table.found.get(run_id, (None, ""))
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

    async def _look_again(self) -> list[RunEntry]:
        """Look for the runs; requests during a look share the next one."""
        asked = time.monotonic()

        def look() -> list[RunEntry]:
            began, found = self._found
            if began < asked:
                began = time.monotonic()
                self._found = began, found = began, self._look()
            return found

        return await anyio.to_thread.run_sync(look, limiter=self._limiter)

    def _look(self) -> list[RunEntry]:
        count = len(self._table.found)
        ended_s = _ENDED_LOOK_S * count if count > _FEW else 0.0
        entries = self._table.look(_FIRST_LOOK_S, _LOOK_S, _PER_RUN_S, ended_s)
        for entry in entries:  # the damage that a hub found in the whole journal
            hub = self._hubs.get(self._table.found[entry.name][0])
            add_damage(entry.run, hub.view.run.damage if hub is not None else None)
        return entries


def runs_of(given: Runs | str | os.PathLike[str]) -> Runs:
    """Return the runs of a folder if ``given`` is its path, otherwise ``given``.

    Raises:
        ArgumentsError: ``given`` is neither a path nor `Runs`.
    """
    if isinstance(given, str | os.PathLike):
        return RunsOfFolder(given)
    if isinstance(given, type) or not all(
        callable(getattr(given, name, None)) for name in ("summaries", "entries", "hub")
    ):
        raise ArgumentsError(f"runs must be a folder or RunsOfFolder(folder), not {given!r:.80}")
    return given
