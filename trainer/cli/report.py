"""``stagecast report``: one HTML file with the charts of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.cli.text import complain, say


def report(run_dirs: Sequence[Path], out: Path | None, *, force: bool) -> int:
    """Write a report; returns the exit code.

    Raises:
        RunFolderError: One of the folders is not that of a run, or nothing of the run can be read.
    """
    from sinks.format import format_bytes
    from sinks.live.report import write_report

    out = out if out is not None else Path(f"{run_dirs[0].resolve().name}.html")
    if out.is_file() and not force:
        complain(f"stagecast report: error: {out} is there already; --force replaces it")
        return 1
    if out.is_dir():
        complain(f"stagecast report: error: {out} is a folder: name a file in it")
        return 1
    if not out.resolve().parent.is_dir():
        complain(f"stagecast report: error: {out.parent} is no folder: make it, or name another file")
        return 1
    damaged: list[str] = []
    try:
        nbytes = write_report(run_dirs, out, lambda run_dir, reason: damaged.append(f"{run_dir} is damaged: {reason}"))
    except OSError as error:
        complain(f"stagecast report: error: {out} cannot be written: {error.strerror or error}")
        return 1
    say(f"{out} ({format_bytes(nbytes)})")
    for text in damaged:
        complain(f"stagecast report: error: {text}; the report has the rest of it")
    return 1 if damaged else 0
