"""Finds run folders at any depth, and gives their runs unique names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from events.bounds import MAX_NAME_CHARS
from events.journal.segment import JOURNAL_DIR
from events.run.damage import add_damage
from events.run.job import JOB_NAME
from events.run.summary import Summary
from events.safe_files import list_below
from events.text import plain_text

MOST_RUNS = 5_000
"""Maximum runs of a folder; the newest ones."""
_MOST_DEPTH = 12
_MOST_FOLDERS = 50_000
"""Maximum folders that are listed in search of runs."""


def run_folders(folder: Path) -> list[Path]:
    """Return the newest folders with a journal or a job, readable or not, and links, which `safe_files.guard` refuses.

    Hidden folders and those in a run folder are not searched.
    """
    if _is_run(folder):
        return [folder]
    found: list[tuple[float, Path]] = []
    level = ["."]
    listed = 0
    for _ in range(_MOST_DEPTH):
        inner: list[str] = []
        for name in level[: _MOST_FOLDERS - listed]:
            listed += 1
            inner += _look_into(folder, name, found)
        level = inner
    return [path for _, path in sorted(found, key=lambda one: one[0], reverse=True)[:MOST_RUNS]]


def _look_into(folder: Path, name: str, found: list[tuple[float, Path]]) -> list[str]:
    """Add the run folders in a folder to ``found``; return its other folders."""
    others: list[str] = []
    try:
        entries = list_below(folder, name)
    except OSError:
        return []
    for entry in entries:
        below = entry.name if name == "." else f"{name}/{entry.name}"
        path = folder / below
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
            if (is_folder and _is_run(path)) or (name == "." and entry.is_symlink() and _leads_out(path)):
                found.append((entry.stat(follow_symlinks=False).st_mtime, path))
            elif is_folder and not entry.name.startswith("."):
                others.append(below)
        except OSError:  # removed
            continue
    return others


def _is_run(path: Path) -> bool:
    """Whether a folder has a journal, or was made for a run that is queued."""
    for name in (JOURNAL_DIR, JOB_NAME):
        try:
            os.lstat(path / name)
        except FileNotFoundError:
            continue
        except OSError:
            pass  # a folder that cannot be read is listed as damaged
        return True
    return False


def _leads_out(link: Path) -> bool:
    """Whether a link points anywhere but to another entry of its folder, which is listed itself."""
    return os.path.dirname(os.path.abspath(link.parent / os.readlink(link))) != str(link.parent)


def name_runs(found: Mapping[Path, Summary], root: Path) -> dict[Path, Summary]:
    """Return the summaries of runs, in which each ``run_id`` is unique and a name.

    Of several folders with one ``run_id`` (copies, for example) the folder of that name keeps it, otherwise the running
    one, or the one with the newest event; the others are named after the ``run_id`` and their folder.
    """
    rank = {path: (path.name != run.run_id, run.status != "running", -run.updated) for path, run in found.items()}
    taken: dict[str, Path] = {}
    summaries: dict[Path, Summary] = {}
    for path, run in sorted(found.items(), key=lambda one: (not _is_name(one[1].run_id), *rank[one[0]])):
        own, folder = run.run_id, _label(path, root, run.run_id)
        name, reason = own, None
        if not _is_name(own):
            name, reason = folder, f"its run_id {plain_text(own, 60)!r} is not a printable name" if own else None
        elif own in taken:
            name, first = f"{own} ({folder})", taken[own]
            run = _with_namesake(run, first, root)
            summaries[first] = _with_namesake(summaries[first], path, root)
        number = 2
        while name in taken:
            name, number = f"{name} ({number})", number + 1
        taken[name] = path
        run = msgspec.structs.replace(run, run_id=name)
        add_damage(run, reason)
        summaries[path] = run
    return summaries


def below(path: Path, root: Path) -> str:
    """A folder relative to that of the table, with slashes; "." for that one."""
    return "." if path == root else path.relative_to(root).as_posix()


def _label(path: Path, root: Path, run_id: str) -> str:
    """The folder of a run as a part of its name, without slashes; its parents alone if it has the run's name."""
    parts = path.relative_to(root).parts or (path.name,)
    if len(parts) > 1 and parts[-1] == run_id:
        parts = parts[:-1]
    return plain_text(":".join(parts), 100) or "run"


def _with_namesake(run: Summary, other: Path, root: Path) -> Summary:
    """Add a problem that names the other folder: one of the two may impersonate the other."""
    problem = f"the folder {plain_text(below(other, root), 100)!r} has a run of the same run_id"
    return run if len(run.problems) > 20 else msgspec.structs.replace(run, problems=[*run.problems, problem])


def _is_name(run_id: str) -> bool:
    """Whether a ``run_id`` can be part of an address and is printable."""
    return (
        run_id.isprintable() and 0 < len(run_id) <= MAX_NAME_CHARS and run_id not in (".", "..") and "/" not in run_id
    )
