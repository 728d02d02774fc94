"""``stagecast report``: one HTML file with the charts of runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def report(run_dirs: Sequence[Path], out: Path | None, *, force: bool) -> int:
    """Write a report; returns the exit code.

    Raises:
        RunFolderError: One of the folders is not that of a run, or nothing of the run can be read.
    """
    from sinks.format import format_bytes, plain_text
    from sinks.live.report import write_report

    out = out if out is not None else Path(f"{run_dirs[0].resolve().name}.html")
    if out.is_file() and not force:
        print(f"stagecast report: error: {out} is there already; --force replaces it", file=sys.stderr)
        return 1
    if out.is_dir():
        print(f"stagecast report: error: {out} is a folder: name a file in it", file=sys.stderr)
        return 1
    if not out.resolve().parent.is_dir():
        print(f"stagecast report: error: {out.parent} is no folder: make it, or name another file", file=sys.stderr)
        return 1
    damaged: list[str] = []
    try:
        nbytes = write_report(run_dirs, out, lambda run_dir, reason: damaged.append(f"{run_dir} is damaged: {reason}"))
    except OSError as error:
        print(f"stagecast report: error: {out} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{out} ({format_bytes(nbytes)})")
    for text in damaged:
        print(f"stagecast report: error: {plain_text(text, 2_000)}; the report has the rest of it", file=sys.stderr)
    return 1 if damaged else 0
