"""``stagecast report``: one HTML file with the charts of runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def report(run_dirs: Sequence[Path], out: Path | None, *, force: bool) -> int:
    """Write a report; returns the exit code.

    Raises:
        RunFolderError: one of the folders is none of a run.
        OSError: the file cannot be written.
    """
    from sinks.format import format_bytes
    from sinks.live.report import write_report

    out = out if out is not None else Path(f"{run_dirs[0].resolve().name}.html")
    if out.exists() and not force:
        print(f"stagecast report: error: {out} is there already; --force replaces it", file=sys.stderr)
        return 1
    if not out.resolve().parent.is_dir():
        print(f"stagecast report: error: {out.parent} is no folder: make it, or name another file", file=sys.stderr)
        return 1
    nbytes = write_report(run_dirs, out)
    print(f"{out} ({format_bytes(nbytes)})")
    return 0
