"""Print text of commands so that names and errors of a run cannot move the terminal's cursor or fake a line.

And the check of the files that commands write.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO

from events.masking import masked
from events.text import plain_text

_MOST_CHARS = 4_000


def echo(*lines: str, style: str = "") -> None:
    """Print lines to stdout; unprintable characters and line breaks are escaped, lines cut at 4,000 characters.

    Args:
        style: Numbers of ANSI, for terminals. Not with rich, which only sinks import.
    """
    shows = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    _print(lines, sys.stdout, style if shows and os.environ.get("TERM", "dumb") != "dumb" else "")


def echo_error(*lines: str) -> None:
    """Print lines to stderr as `echo` does, without the passwords and tokens of URLs."""
    _print(tuple(map(masked, lines)), sys.stderr)


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception through `echo_error`: for `sys.excepthook`."""
    echo_error(*"".join(traceback.format_exception(kind, error, trace)).expandtabs().rstrip("\n").split("\n"))


def _print(lines: tuple[str, ...], stream: TextIO | None, style: str = "") -> None:
    begin, end = (f"\x1b[{style}m", "\x1b[m") if style else ("", "")
    print(*(f"{begin}{plain_text(line, _MOST_CHARS)}{end}" for line in lines), sep="\n", file=stream, flush=True)


def check_out(out: Path, *, force: bool) -> None:
    """Check that a command may write a file.

    Raises:
        OSError: It exists and ``force`` is not set, is not a plain file, or has no folder.
    """
    if out.is_dir():
        raise OSError(f"{out} is a folder; name a file in it")
    if out.exists() and not out.is_file():
        raise OSError(f"{out} is not a plain file; use another path")
    if os.path.lexists(out) and not force:
        raise OSError(f"{out} exists; use another name, or --force to replace it")
    if not out.parent.is_dir():
        raise OSError(f"{out.parent} is not a folder; create it, or use another name")
