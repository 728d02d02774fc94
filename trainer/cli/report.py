"""``stagecast report``: one HTML file with the charts of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.cli.text import check_out, echo, echo_error


def report(run_dirs: Sequence[str], out: str | None, *, force: bool) -> int:
    """Write a report; returns the exit code.

    Raises:
        RunFolderError: A folder is not a run folder, or is unreadable.
        OSError: The file exists, or cannot be written.
    """
    from sinks.format import format_bytes
    from sinks.live.report import write_report

    path = Path(out or f"{Path(run_dirs[0]).resolve().name}.html")
    check_out(path, force=force)
    damaged: list[str] = []
    try:
        nbytes = write_report(run_dirs, path, lambda run_dir, reason: damaged.append(f"{run_dir} is damaged: {reason}"))
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    echo(f"{path} ({format_bytes(nbytes)})")
    for text in damaged:
        echo_error(f"stagecast report: error: {text}; the report contains the rest of it")
    return 1 if damaged else 0
