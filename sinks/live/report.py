"""One HTML file with the page and its runs, which needs no server."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from events.errors import RunFolderError
from events.run.folder import is_held
from events.run.pushed import is_pushed
from events.safe_files import replace_below
from events.table.columns import page_row
from events.table.gather import FoundRun, gather_runs
from sinks.format import format_bytes
from sinks.live.images import open_image
from sinks.live.report_file import ReportRun, document
from sinks.live.series import thinned
from sinks.live.stored import read_view
from sinks.live.view import RunView

MOST_MEDIA_BYTES = 32 * 2**20
"""Maximum bytes of images, sounds and tables per report; beyond it, the oldest are skipped."""
MOST_RUNS = 100
"""Maximum runs with curves per report, the newest ones; the results of all are in its table."""
_MOST_POINTS = 1_000_000
"""Maximum points of all curves in memory, unless the report is a full one."""


class Report(NamedTuple):
    """A report that was written."""

    nbytes: int
    notices: list[str]
    """Sentences about what the file lacks, if anything."""


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    on_damage: Callable[[Path, str], None] = lambda run_dir, reason: None,
    *,
    title: str = "",
    notes: str = "",
    full: bool = False,
) -> Report:
    """Write a report of runs, which it shows over each other. Waits for the disk.

    The file is written atomically. Its curves have as many points as fit 1 MB, media apart; points beyond that are
    merged, with their lowest and highest value, and the best and last values stay exact.

    Args:
        folders: Run folders, or folders with runs at any depth. A run that is given twice appears once.
        on_damage: Called with the reason for each run that was read in part or not at all. The report names it too.
        title: By default the name of the only run, or the number of runs.
        notes: Plain text at the top of the report.
        full: Keep all points of the page's curves at full precision, however large the file becomes.

    Raises:
        RunFolderError: A folder has no runs, or none of them can be read.
        OSError: The file cannot be written.
    """
    found = gather_runs(folders)
    most = math.inf if full else _MOST_POINTS // min(len(found), MOST_RUNS)
    runs: list[ReportRun] = []
    media: dict[str, str] = {}
    skipped = 0
    damaged: list[str] = []
    for one in found:
        if len(runs) == MOST_RUNS:
            break
        view, _ = read_view(one.path)
        damage = view.run.damage or one.entry.run.damage
        if not view.run.run_id:
            damage = damage or "no line of its journal is an event"
        if damage is not None:
            damaged.append(f"{one.path} is damaged: {damage}")
            on_damage(one.path, damage)
        if view.run.run_id:
            runs.append(_report_run(one, view, most))
            found_media, more = _media(one, view, MOST_MEDIA_BYTES - sum(map(len, media.values())) * 3 // 4)
            media |= found_media
            skipped += more
    if not runs:
        raise RunFolderError(damaged[0])
    first = found[0].entry
    notices = _notices(len(runs), len(found), skipped)
    data = {
        "title": title or (first.label if len(found) == 1 else f"{len(found):,} runs"),
        "notes": notes,
        "notices": notices,
        "table": [page_row(one.entry) for one in found],
    }
    page, missing = document(data, media, runs, full=full)
    path = Path(out)
    return Report(replace_below(path.parent, path.name, page), [*notices, *missing])


def _notices(shown: int, found: int, skipped: int) -> list[str]:
    notices = []
    if shown == MOST_RUNS < found:
        notices.append(f"the curves are those of {MOST_RUNS:,} of {found:,} runs; the table has all")
    if skipped:
        room = format_bytes(MOST_MEDIA_BYTES)
        notices.append(f"{skipped:,} images, sounds and tables are missing: a file has room for {room} of them")
    return notices


def _report_run(one: FoundRun, view: RunView, most: float) -> ReportRun:
    """Return a run under the name that it has in the report."""
    view.run.settle(is_held=is_held(one.path), is_pushed=is_pushed(one.path))
    view.run.run_id = one.entry.name
    view.run.latest = {}  # the curves have the same
    curves, log = view.curves.series, view.log
    if most < math.inf:
        each = max(1, int(most // max(1, len(curves))))
        curves = {name: thinned(series, each) for name, series in curves.items()}
    points = max((len(series.step) for series in view.curves.series.values()), default=0)
    view.curves.series, view.log = {}, []
    return ReportRun(one.entry, view.snapshot(), curves, log, points)


def _media(one: FoundRun, view: RunView, room: int) -> tuple[dict[str, str], int]:
    """Return images, sounds and tables, the newest first, by their address on the page; and how many had no room."""
    found: dict[str, str] = {}
    skipped = 0
    for shown in reversed(view.media):
        path = str(shown.path)
        address = f"{one.entry.name}/{path}"
        if shown.kind == "text" or not path.startswith("media/") or address in found:
            continue
        try:
            file = open_image(one.path, path)
        except (OSError, ValueError):  # deleted, or not of the run
            continue
        with file.file:
            if file.size > room:
                skipped += 1
                continue
            room -= file.size
            content = base64.b64encode(file.file.read(file.size)).decode()
            found[address] = f"data:{file.media_type};base64,{content}"
    return found, skipped
