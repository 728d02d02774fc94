"""The runs of several folders, for reports: each once, under a name of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from events.errors import RunFolderError
from events.table.entry import RunEntry
from events.table.folders import name_runs
from events.table.table import RunTable


class FoundRun(NamedTuple):
    """A run folder, and the entry of its run."""

    path: Path
    entry: RunEntry


def gather_runs(folders: Sequence[str | os.PathLike[str]]) -> list[FoundRun]:
    """Return the runs of run folders, and of the runs in other folders at any depth. Waits for the disk.

    The runs of a folder are sorted, the newest first. Runs of one ``run_id`` are named as in a table of runs
    (`events.table.folders.name_runs`).

    Raises:
        RunFolderError: A folder does not exist, or has no runs.
    """
    found: dict[Path, FoundRun] = {}
    own: dict[Path, str] = {}
    for folder in dict.fromkeys(folders):
        if not Path(folder).is_dir():
            raise RunFolderError(f"{folder} is not a folder; name a run folder, or a folder of run folders")
        table = RunTable(folder)
        entries = table.look()
        if not entries:
            raise RunFolderError(f"{folder} has no runs; name a run folder, or a folder of run folders")
        for entry in entries:
            path, run_id = table.found[entry.name]
            if entry.folder == ".":
                entry.folder = path.resolve().name
            if found.setdefault(path.resolve(), FoundRun(path, entry)).entry is entry:
                own[path] = run_id
    runs = list(found.values())
    if len({one.entry.name for one in runs}) == len(runs):
        return runs
    summaries = {one.path: msgspec.structs.replace(one.entry.run, run_id=own[one.path]) for one in runs}
    names = name_runs(summaries, Path(os.path.commonpath(summaries)))
    return [one._replace(entry=_named(one.entry, names[one.path].run_id)) for one in runs]


def _named(entry: RunEntry, name: str) -> RunEntry:
    return msgspec.structs.replace(entry, name=name, run=msgspec.structs.replace(entry.run, run_id=name))
