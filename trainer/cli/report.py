"""``stagecast report``: one HTML file with the charts of runs, or their results as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from events.errors import ArgumentsError
from trainer.cli.text import check_out, echo, echo_error

MOST_NOTES_CHARS = 100_000


def report(
    folders: Sequence[str],
    out: str | None,
    *,
    markdown: bool,
    force: bool,
    title: str | None = None,
    notes: str | None = None,
    full: bool = False,
) -> int:
    """Write a report; returns the exit code, which is 1 if a run is damaged.

    Args:
        notes: Text, or the name of a file that has it.

    Raises:
        RunFolderError: A folder has no runs, or is unreadable.
        ArgumentsError: ``notes`` is the name of a file that does not exist, or too long.
        OSError: The file exists, or cannot be written.
    """
    if markdown:
        return _report_markdown(folders, out, title, notes, force=force)
    from sinks.format import format_bytes
    from sinks.live.report import write_report

    path = Path(out or f"{Path(folders[0]).resolve().name}.html")
    check_out(path, force=force)
    damaged: list[str] = []
    try:
        written = write_report(
            folders,
            path,
            lambda run_dir, reason: damaged.append(f"{run_dir} is damaged: {reason}"),
            title=title or "",
            notes=_text_of(notes),
            full=full,
        )
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    echo(f"{path} ({format_bytes(written.nbytes)})")
    for text in written.notices:
        echo_error(f"stagecast report: {text}")
    for text in damaged:
        echo_error(f"stagecast report: error: {text}; the report contains the rest of it")
    return 1 if damaged else 0


def _text_of(notes: str | None) -> str:
    """Return the text of ``--notes``: the content of a file of this name, or the text itself."""
    text = notes or ""
    if os.path.isfile(text):
        text = Path(text).read_text("utf-8", "replace")
    elif text.endswith((".md", ".txt")) and not any(map(str.isspace, text)):
        raise ArgumentsError(f"--notes {text} is not a file; give an existing file, or the text itself")
    if len(text) > MOST_NOTES_CHARS:
        raise ArgumentsError(f"--notes has {len(text):,} characters; the maximum is {MOST_NOTES_CHARS:,}")
    return text


def _report_markdown(
    folders: Sequence[str], out: str | None, title: str | None, notes: str | None, *, force: bool
) -> int:
    from events.safe_files import replace_below
    from events.table.gather import gather_runs
    from trainer.cli.markdown import markdown

    path = None if out is None else Path(out)
    if path is not None:
        check_out(path, force=force)
    entries = [one.entry for one in gather_runs(folders)]
    text = markdown(entries, title, _text_of(notes))
    if path is None:
        print(text, end="")
    else:
        replace_below(path.parent, path.name, text.encode())
        echo(str(path))
    damaged = [entry for entry in entries if entry.run.damage is not None]
    for entry in damaged:
        echo_error(f"stagecast report: error: {entry.name} is damaged: {entry.run.damage}")
    return 1 if damaged else 0
