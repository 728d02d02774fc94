"""The console: live bars in a terminal, plain lines elsewhere. Writes to stderr, because stdout is the program's.

Rich detects the terminal (size, colours, ``NO_COLOR``); this module draws the bars, for four reasons. The refresh
thread of ``rich.live.Live`` would take the interpreter lock from the training loop, and a frame of ``rich.progress``
costs eight times as much. It hides the cursor, which a killed process cannot restore. It moves up by the number of
lines that it remembers, which a ``print`` or a resize makes wrong. On a broken pipe, rich redirects the stdout of the
whole process to ``/dev/null``.

Here the visible cursor rests at the start of an empty line *above* the bars, and each frame first clears from there to
the end of the screen. Other output lands on that empty line and stays (from its second line within one frame on, with
the rest of a bar behind it); a resize, Ctrl-Z or ``kill -9`` leaves nothing to repair.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, ClassVar

from events.ipython import kernel_shell
from events.messages import Event, MetricsLogged, WarningLogged
from events.run.state import RunState
from events.sink import Delivery, RunInfo
from events.strict import Strict
from sinks.console.bars import bar_rows, progress_line
from sinks.console.lines import Chronicle
from sinks.console.text import Line, Span, wrap
from sinks.format import format_clock, plain_text

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from sinks.notebook.sink import Notebook

_CLEAR_BELOW = "\r\x1b[J"
_PALETTE = {
    "head": "bold",
    "dim": "dim",
    "bar": "cyan",
    "done": "green",
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
}
# Each line has a colour, a sign and words, and can be read without any two of them.
_SIGNS = {"note": "·", "epoch": "•", "good": "✓", "warn": "!", "bad": "✗"}
_ASCII_SIGNS = {"note": "-", "epoch": "*", "good": "+", "warn": "!", "bad": "x"}


class Console(Strict, frozen=True):
    """Shows a run in the terminal: bars if it can move its cursor, plain lines otherwise.

    Permanent lines report results of epochs, failures, drops, pauses, the end, and the time of the loop. One console
    per process draws bars; a second one prints plain lines between them, with the name of its run.
    """

    refresh_per_s: float = 2.0
    """Maximum redraws of the bars per second."""
    line_every_s: float = 10.0
    """Seconds of training between two lines of progress, without a terminal."""
    force_terminal: bool | None = None
    """True: bars; False: plain lines. None: bars if stderr is a capable terminal, a live display in a notebook."""

    shows_warnings: ClassVar[bool] = True
    """Warnings of a run with this sink are not also written to stderr."""

    # A person reads the present, so newer step events may replace older ones, and a quarter of a second is soon enough:
    # each wake of this thread takes the interpreter lock from the loop. A stream that failed once (a closed pipe) stays
    # broken, so there are no retries. No timeout, because Ctrl-S may stop a terminal for long.
    delivery: ClassVar[Delivery] = Delivery(
        runs_in="thread",  # the terminal is this process's
        types=Chronicle(RunState()).types,
        overflow="latest",
        capacity=8_192,
        latency_s=0.25,
        batch=4_096,
        on_error="disable",
        timeout_s=None,
    )

    def __post_init__(self) -> None:
        if not 0 < self.refresh_per_s <= 60:
            raise ValueError(f"Console(refresh_per_s={self.refresh_per_s}): give a number above 0, up to 60")
        if not self.line_every_s > 0:
            raise ValueError(f"Console(line_every_s={self.line_every_s}): give a number of seconds above 0")

    def bound(self) -> Console | Notebook:
        """Return the display of a notebook's cell in a kernel, unless `force_terminal` asks for text."""
        shell = kernel_shell() if self.force_terminal is None else None
        if shell is None:
            return self
        from sinks.notebook.sink import Notebook  # late, because only a notebook needs it

        return Notebook.in_cell(shell)

    def open(self, run: RunInfo) -> ConsoleWriter:
        """Choose bars or lines by stderr. Imports rich."""
        from rich.console import Console as RichConsole

        # None (pythonw), closed, or not a stream: nothing can be shown, which is not a failure.
        stream = sys.stderr
        gone = getattr(stream, "closed", False) or not callable(getattr(stream, "write", None))
        console = RichConsole(stderr=True, file=_Nowhere() if gone else None, force_terminal=self.force_terminal)
        return ConsoleWriter(
            run,
            console,
            live=self.force_terminal,
            refresh_per_s=self.refresh_per_s,
            line_every_s=self.line_every_s,
        )


class _Nowhere(io.StringIO):
    """Discards text."""

    def write(self, text: str, /) -> int:
        return len(text)


class ConsoleWriter:
    """An open `Console`. Used by one thread; starts none, and redraws only in `write`.

    Args:
        console: For a test, ``rich.console.Console(file=io.StringIO(), width=80, height=24)``.
        live: Whether to draw bars; None: by the stream.
    """

    def __init__(
        self,
        run: RunInfo,
        console: RichConsole,
        *,
        live: bool | None = None,
        refresh_per_s: float = 2.0,
        line_every_s: float = 10.0,
    ) -> None:
        self._console = console
        # Kept, because rich reads sys.stderr at each use, and would follow a replacement.
        self._file = console.file
        self._every_s = 1 / refresh_per_s
        self._line_every_s = line_every_s
        self._state = RunState()
        self._chronicle = Chronicle(self._state, run.run_dir)
        self._ascii = console.options.ascii_only
        terminal = _can_move_cursor(console) if live is None else live
        self._live = terminal and _claim(self._file)
        # Between the bars of another console, each line names its run.
        self._line_start = f"{plain_text(run.run_id, 80)}  " if terminal and not self._live else ""
        self._paint = _paints(console) if self._live else {}
        self._drawn_at = -self._every_s
        self._line_due: float | None = None
        self._moved = False
        self._block = False  # whether bars are on the screen
        self._silent = False
        self._lock = threading.Lock()  # contended only at the exit of the interpreter
        if self._live:
            atexit.register(self._at_exit)

    def write(self, events: Sequence[Event]) -> None:
        """Print permanent lines at once; redraw the bars if they are due.

        Raises:
            BrokenPipeError, ValueError: The stream raises it if it is broken or closed; the writer is silent then.
        """
        with self._lock:
            if self._silent:
                return
            lines = self._take(events)
            if self._live:
                due = time.monotonic() - self._drawn_at >= self._every_s
                if lines or (due and self._moved):
                    self._draw(lines)
            else:
                lines += self._progress_line()
                self._print(lines)

    def close(self) -> None:
        """Print suppressed lines and leave the cursor below the bars. Never raises; may be repeated."""
        with self._lock:
            self._finish()

    def _finish(self) -> None:
        atexit.unregister(self._at_exit)
        if self._live:
            _release(self._file)
        if self._silent:
            return
        lines = self._chronicle.finish()
        # The stream may be broken by now, and closing must not fail.
        with contextlib.suppress(OSError, ValueError):
            if self._live:
                clear = _CLEAR_BELOW if self._block else ""
                rest = self._rows() if self._block else []  # without the run's end the last state stays
                self._send(clear + "".join(f"{row}\n" for row in [*self._wrapped(lines), *rest]))
            else:
                self._print(lines)
        self._silent = True

    def _at_exit(self) -> None:
        """Close at the exit of the interpreter, so that the shell's prompt is below the bars."""
        if self._lock.acquire(timeout=1.0):  # a write that hangs must not keep the process alive
            try:
                self._finish()
            finally:
                self._lock.release()

    # ------------------------------------------------------------------------------------------- events

    def _take(self, events: Sequence[Event]) -> list[Line]:
        from events.log import is_on_stderr  # imports structlog, which a description does not need

        # Nearly all events are steps and their metrics: thousands a second, on a thread that competes with the loop.
        shown = [
            event
            for event in events
            if not (type(event) is MetricsLogged and event.key is None)
            and not (type(event) is WarningLogged and is_on_stderr(event))
        ]
        self._moved = self._moved or bool(events)
        return [line for event in self._state.follow(shown) for line in self._chronicle.take(event)]

    # --------------------------------------------------------------------------------------- a terminal

    def _draw(self, lines: Iterable[Line]) -> None:
        rows = [] if self._state.has_ended else self._rows()
        # Without bars the cursor may be behind the program's own text, which must stay.
        frame = [_CLEAR_BELOW if self._block else "", *(f"{row}\n" for row in self._wrapped(lines))]
        if rows:
            frame += ["\n", "\n".join(rows), f"\x1b[{len(rows)}A\r"]
        self._block = bool(rows)
        self._send("".join(frame))
        self._drawn_at = time.monotonic()
        self._moved = False

    def _rows(self) -> list[str]:
        width, height = self._console.size
        rows = bar_rows(self._state, width - 1, ascii_only=self._ascii)  # -1: the last column may wrap
        return [self._painted(row) for row in rows[: max(0, height - 2)]]

    def _wrapped(self, lines: Iterable[Line]) -> list[str]:
        width = self._console.size[0] - 1
        signs = _ASCII_SIGNS if self._ascii else _SIGNS
        out = []
        for line in lines:
            sign = self._painted([Span(signs[line.kind], line.kind)])
            for index, row in enumerate(wrap(line, max(10, width - 2))):
                out.append(f"{sign if index == 0 else ' '} {self._painted(row)}")
        return out

    def _painted(self, spans: Iterable[Span]) -> str:
        paint = self._paint
        return "".join([paint.get(style, "\0").replace("\0", text) for text, style in spans]).rstrip()

    # ------------------------------------------------------------------------------------- no terminal

    def _print(self, lines: Iterable[Line]) -> None:
        signs = _ASCII_SIGNS if self._ascii else _SIGNS
        start = self._line_start
        text = "".join(f"{format_clock(line.time)} {signs[line.kind]} {start}{line.text}\n" for line in lines)
        if text:
            # Between another console's bars the cursor rests on their empty line; they are redrawn soon.
            self._send(_CLEAR_BELOW + text if start else text)

    def _progress_line(self) -> list[Line]:
        """One line of progress if it is due by the time of the events."""
        now = self._state.pace.time
        if self._line_due is None:
            self._line_due = now + self._line_every_s
        # A time much earlier than the last line means that the clock was set back.
        if self._state.has_ended or self._line_due - 2 * self._line_every_s <= now < self._line_due:
            return []
        self._line_due = now + self._line_every_s
        return [progress_line(self._state)]

    def _send(self, text: str) -> None:
        """Write once and flush, because a frame in pieces flickers. May wait for the terminal."""
        if self._ascii:
            encoding = self._console.encoding
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._silent = True  # until the write succeeds: `close` must not write to a broken stream
        self._file.write(text)
        flush = getattr(self._file, "flush", None)  # the stream of a host program may only have `write`
        if flush is not None:
            flush()
        self._silent = False


def _can_move_cursor(console: RichConsole) -> bool:
    """Whether bars can be drawn. Rich alone would draw them into a file if FORCE_COLOR is set."""
    if console.is_dumb_terminal or console.legacy_windows or console.is_jupyter:
        return False
    isatty = getattr(console.file, "isatty", None)
    return console.is_terminal and isatty is not None and bool(isatty())


def _paints(console: RichConsole) -> dict[str, str]:
    """Render a NUL in each style once; painting then replaces the NUL."""
    from rich.console import COLOR_SYSTEMS
    from rich.style import Style

    system = COLOR_SYSTEMS[console.color_system] if console.color_system is not None else None
    styles = {name: Style.parse(definition) for name, definition in _PALETTE.items()}
    return {
        name: (style.without_color if console.no_color else style).render("\0", color_system=system)
        for name, style in styles.items()
    }


_claims_lock = threading.Lock()
_claims: list[IO[str]] = []


def _claim(file: IO[str]) -> bool:
    """Reserve a stream for live bars; False if another console of this process draws there."""
    with _claims_lock:
        if any(other is file for other in _claims):
            return False
        _claims.append(file)
        return True


def _release(file: IO[str]) -> None:
    with _claims_lock:
        _claims[:] = [other for other in _claims if other is not file]
