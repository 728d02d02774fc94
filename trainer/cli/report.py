"""``stagecast report``: one HTML file with the charts of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.cli.text import echo, echo_error


def report(run_dirs: Sequence[Path], out: Path | None, *, force: bool) -> int:
    """Write a report; returns the exit code.

    Raises:
        RunFolderError: A folder is not a run folder, or is unreadable.
    """
    from sinks.format import format_bytes
    from sinks.live.report import write_report

    out = out if out is not None else Path(f"{run_dirs[0].resolve().name}.html")
    if out.is_file() and not force:
        echo_error(f"stagecast report: error: {out} exists; --force replaces it")
        return 1
    if out.is_dir():
        echo_error(f"stagecast report: error: {out} is a folder; name a file in it")
        return 1
    if not out.resolve().parent.is_dir():
        echo_error(f"stagecast report: error: {out.parent} is not a folder; create it, or name another file")
        return 1
    damaged: list[str] = []
    try:
        nbytes = write_report(run_dirs, out, lambda run_dir, reason: damaged.append(f"{run_dir} is damaged: {reason}"))
    except OSError as error:
        echo_error(f"stagecast report: error: {out} cannot be written: {error.strerror or error}")
        return 1
    echo(f"{out} ({format_bytes(nbytes)})")
    for text in damaged:
        echo_error(f"stagecast report: error: {text}; the report contains the rest of it")
    return 1 if damaged else 0
