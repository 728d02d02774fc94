"""Print text of commands so that names and errors of a run cannot move the terminal's cursor or fake a line."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType
from typing import Any

from events.masking import masked
from events.text import plain_text

_MOST_CHARS = 4_000


def echo(*lines: str) -> None:
    """Print lines to stdout; unprintable characters and line breaks are escaped, lines cut at 4,000 characters."""
    _print(lines, sys.stdout)


def echo_error(*lines: str) -> None:
    """Print lines to stderr as `echo` does, without the passwords and tokens of URLs."""
    _print(tuple(map(masked, lines)), sys.stderr)


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception through `echo_error`: for `sys.excepthook`."""
    echo_error(*"".join(traceback.format_exception(kind, error, trace)).expandtabs().rstrip("\n").split("\n"))


def _print(lines: tuple[str, ...], stream: Any) -> None:
    print(*(plain_text(line, _MOST_CHARS) for line in lines), sep="\n", file=stream, flush=True)
