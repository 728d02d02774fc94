"""The entries of the list of runs: each from the start and the end of its journal, under a unique name."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import msgspec

from events.bounds import MAX_NAME_CHARS
from events.health import Health
from events.journal.history import EventFinder
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR
from events.journal.tail import journal_tail
from events.run.folder import is_held
from events.run.summary import Summary
from sinks.damage import damage_in
from sinks.format import plain_text
from sinks.live.stored import batches, head_of
from sinks.live.trim import trimmed
from sinks.live.view import RunView, damage_line

_HEAD = 64


class HealthReader:
    """Reads the problems of a run from its whole journal, which may grow. Belongs to one thread."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._head: bytes | None = None
        self.is_behind = False
        """Whether the last call has not reached the end of the journal."""

    def problems(self, until: float = math.inf) -> list[str]:
        """Read new events, and return the problems. Raises `OSError`.

        Args:
            until: Stop soon after this time (`time.monotonic`); then `is_behind` is True, and the next call continues.
        """
        head = head_of(self._run_dir)
        if head != self._head:  # the first read, or another run has the folder now
            self._head, self._health = head, Health()
            self._finder = EventFinder(self._run_dir / JOURNAL_DIR, self._health.types)
        for event in self._finder.find(until):
            self._health.add(trimmed([event])[0])
        self.is_behind = time.monotonic() > until
        return self._health.problems


def summarise(run_dir: str | os.PathLike[str], health: HealthReader | None = None, until: float = math.inf) -> Summary:
    """Return the entry of a run in the list, from the start and the end of its journal. Raises `OSError`.

    Args:
        health: Has read the run's journal before; None reads all of it.
        until: Stop reading soon after this time (`time.monotonic`), with a partial result.
    """
    run_dir = Path(run_dir)
    journal_dir = run_dir / JOURNAL_DIR
    reader = JournalReader(journal_dir)
    view = RunView()
    count = 0
    for batch in batches(reader, until, _HEAD):
        view.add(batch)  # at once, because a few events may be as large as a whole view
        count += len(batch)
        if count >= _HEAD:
            break
    tail = journal_tail(journal_dir).events
    view.add(trimmed([event for event in tail if count and event.seq > view.cursor]))
    view.run.settle(is_held=is_held(run_dir))
    view.run.problems = (health or HealthReader(run_dir)).problems(until)
    add_damage(view.run, damage_in(reader))
    return view.run


def add_damage(run: Summary, reason: str | None) -> None:
    """Add the reason of a damage, if there is one, and none is known yet."""
    if reason is None or run.damage is not None:
        return
    run.damage = reason
    run.problems = [damage_line(reason), *run.problems]
    run.settle(is_held=run.status == "running")


def named(found: dict[Path, Summary]) -> tuple[dict[str, tuple[Path, str]], list[Summary]]:
    """Give each run a unique name; return folder and ``run_id`` by name, and the summaries with these names."""
    rank = {path: (path.name != run.run_id, run.status != "running", -run.updated) for path, run in found.items()}
    paths: dict[str, tuple[Path, str]] = {}
    summaries: dict[Path, Summary] = {}
    for path, run in sorted(found.items(), key=lambda one: (not _is_name(one[1].run_id), *rank[one[0]])):
        own, folder = run.run_id, plain_text(path.name, 100) or "run"
        name, reason = own, None
        if not _is_name(own):
            name, reason = folder, f"its run_id {plain_text(own, 60)!r} is not a printable name" if own else None
        elif own in paths:
            name, first = f"{own} ({folder})", paths[own][0]
            run = _with_namesake(run, first)
            summaries[first] = _with_namesake(summaries[first], path)
        number = 2
        while name in paths:
            name, number = f"{name} ({number})", number + 1
        paths[name] = path, own
        run = msgspec.structs.replace(run, run_id=name)
        add_damage(run, reason)
        summaries[path] = run
    return paths, list(summaries.values())


def _with_namesake(run: Summary, other: Path) -> Summary:
    """Add a problem that names the other folder: one of the two may impersonate the other."""
    problem = f"the folder {plain_text(other.name, 100)!r} has a run of the same run_id"
    return run if len(run.problems) > 20 else msgspec.structs.replace(run, problems=[*run.problems, problem])


def _is_name(run_id: str) -> bool:
    """Whether a ``run_id`` can be part of an address and is printable."""
    return (
        run_id.isprintable() and 0 < len(run_id) <= MAX_NAME_CHARS and run_id not in (".", "..") and "/" not in run_id
    )
