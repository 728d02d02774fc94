"""``stagecast report``: one HTML file with the charts of runs, or their results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.cli.text import check_out, echo, echo_error


def report(run_dirs: Sequence[str], out: str | None, *, markdown: bool, force: bool) -> int:
    """Write a report; returns the exit code, which is 1 if a run is damaged.

    Raises:
        RunFolderError: A folder is not a run folder, or is unreadable.
        OSError: The file exists, or cannot be written.
    """
    if markdown:
        return _report_markdown(run_dirs, out, force=force)
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


def _report_markdown(folders: Sequence[str], out: str | None, *, force: bool) -> int:
    from events.safe_files import replace_below
    from trainer.cli.markdown import entries_of, markdown

    path = None if out is None else Path(out)
    if path is not None:
        check_out(path, force=force)
    entries = entries_of(folders)
    text = markdown(entries)
    if path is None:
        print(text, end="")
    else:
        replace_below(path.parent, path.name, text.encode())
        echo(str(path))
    damaged = [entry for entry in entries if entry.run.damage is not None]
    for entry in damaged:
        echo_error(f"stagecast report: error: {entry.name} is damaged: {entry.run.damage}")
    return 1 if damaged else 0
