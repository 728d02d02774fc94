"""The events of a run that no one trained, and a terminal small enough to read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

import sinks
from events.sink import RunInfo
from sinks.console.console import ConsoleWriter
from sinks.testing import Story

ROOT = Path(sinks.__file__).parent.parent


class Screen:
    """What a terminal would show after some output. Refuses every control sequence that it does not know."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.y = self.x = self.top = 0
        self.cursor_shown = True

    def feed(self, output: str) -> Screen:
        for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|.|\n|\r", output):
            if token.startswith("\x1b["):
                self._control(token[2:])
            elif token == "\n":
                self._down()
                self.x = 0  # as a terminal's driver does with a program's line feed
            elif token == "\r":
                self.x = 0
            else:
                assert token.isprintable(), f"the output contains {token!r}"
                self._put(token)
        return self

    def _control(self, sequence: str) -> None:
        if sequence == "J":
            del self.rows[self.y + 1 :]
            del self.rows[self.y][self.x :]
        elif sequence.endswith("A"):
            self.y = max(self.top, self.y - int(sequence[:-1]))
        elif sequence in ("?25l", "?25h"):
            self.cursor_shown = sequence.endswith("h")
        else:
            assert sequence.endswith("m"), f"the output contains the control sequence {sequence!r}"

    def _put(self, char: str) -> None:
        cells = 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if self.x + cells > self.width:
            self._down()
            self.x = 0
        row = self.rows[self.y]
        row.extend(" " * (self.x + cells - len(row)))
        row[self.x : self.x + cells] = [char, *[""] * (cells - 1)]
        self.x += cells

    def _down(self) -> None:
        self.y += 1
        while len(self.rows) <= self.y:
            self.rows.append([])
        self.top = max(self.top, self.y - self.height + 1)

    @property
    def lines(self) -> list[str]:
        """All lines, those that were scrolled away included."""
        return ["".join(row).rstrip() for row in self.rows]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def bars(self) -> dict[str, str]:
        """The rows below the cursor, by their label."""
        return {line.split()[0]: line for line in self.lines[self.y :] if line}


class Terminal:
    """A `ConsoleWriter` with live bars on an in-memory stream, and the screen that results."""

    def __init__(self, width: int = 100, height: int = 30, file: io.TextIOBase | None = None, **options: Any) -> None:
        self.size = (width, height)
        self.file = io.StringIO() if file is None else file
        color = options.pop("color_system", "256")
        self.rich = RichConsole(
            file=self.file,  # type: ignore[arg-type]
            width=width,
            height=height,
            force_terminal=True,
            color_system=color,
            no_color=options.pop("no_color", False),
        )
        # Redraw at every write: nothing here depends on the clock.
        options = {"live": True, "refresh_per_s": 1e9} | options
        self.writer = ConsoleWriter(RunInfo("demo"), self.rich, **options)

    def write(self, *events: Any) -> Screen:
        self.writer.write(events)
        return self.screen

    @property
    def output(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()

    @property
    def screen(self) -> Screen:
        return Screen(*self.size).feed(self.output)


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def screen() -> type[Screen]:
    return Screen


@pytest.fixture
def terminal() -> Any:
    """Opens terminals, and closes them when the test is over."""
    opened: list[Terminal] = []

    def build(*args: Any, **options: Any) -> Terminal:
        opened.append(Terminal(*args, **options))
        return opened[-1]

    yield build
    for one in opened:
        one.writer.close()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own that can import the package."""

    def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "script.py"
        file.write_text(script)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": ""} | env
        return subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, timeout=50)

    return run


@contextlib.contextmanager
def _full_at(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_at() -> Any:
    """Within it no file of this process may become larger: the disk takes a part of a write, then none."""
    return _full_at
