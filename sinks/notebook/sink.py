"""The console in a notebook: a display in the cell that starts the run."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from events.ipython import kernel_shell
from events.journal.segment import JOURNAL_DIR
from events.messages import Event
from events.sink import Delivery, RunInfo
from events.strict import Strict
from sinks.notebook.kernel import Cell

if TYPE_CHECKING:
    from sinks.notebook.hub import CellHub

_EVERY_S = 0.5
"""Minimum seconds between two messages to the notebook."""
_ALIVE_S = 2.0
"""Maximum seconds between two messages: one without news shows the page that the run is alive."""


class Notebook(Strict, frozen=True):
    """Shows a run in the output of a cell. `Console` becomes one in the kernel of a notebook."""

    display_id: str

    shows_warnings: ClassVar[bool] = True
    """Warnings of a run with this sink are not also written to stderr."""
    # As for the console: a person reads the present, and each wake takes the interpreter lock from the loop.
    delivery: ClassVar[Delivery] = Delivery(
        runs_in="thread",  # the kernel's channels are this process's
        overflow="latest",
        latency_s=0.25,
        batch=4_096,
        on_error="disable",
        timeout_s=None,
    )

    @staticmethod
    def in_cell(shell: Any) -> Notebook:
        """Reserve the display in the cell that runs now. On the thread of the cell."""
        one = Notebook(f"stagecast-{secrets.token_hex(8)}")
        Cell(shell, one.display_id).open()
        return one

    def open(self, run: RunInfo) -> NotebookWriter:
        """Read the journal of earlier attempts, and start to show the run."""
        from sinks.live.stored import read_view
        from sinks.notebook.hub import CellHub

        run_dir = Path(run.run_dir) if run.run_dir is not None else None
        hub = CellHub(run_dir)
        if run.attempt > 1 and run_dir is not None and (run_dir / JOURNAL_DIR).is_dir():
            hub.view, _ = read_view(run_dir)
        hub.view.run.run_id = run.run_id
        return NotebookWriter(hub, Cell(kernel_shell(), self.display_id))


class NotebookWriter:
    """An open `Notebook`. Its messages leave from a thread of their own, so that events never wait for a front end."""

    def __init__(self, hub: CellHub, cell: Cell) -> None:
        from sinks.notebook.content import Options

        self._hub, self._cell = hub, cell
        kernel = cell.take_commands(hub.run_dir)
        hub.allows_commands = kernel is not None
        self._options = Options(cell.display_id, kernel, live=True)
        self._has_page = False
        self._error: Exception | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="stagecast-notebook", daemon=True)
        self._thread.start()

    def write(self, events: Sequence[Event]) -> None:
        """Add events; the display follows within half a second. Raises the exception that ended the thread."""
        if self._error is not None:
            raise self._error
        self._hub.feed(events)

    def close(self) -> None:
        """Show the end of the run: a card, and the page with the run's data, which the notebook's file keeps."""
        self._over.set()
        self._thread.join()
        self._cell.close()
        options = msgspec.structs.replace(self._options, kernel=None, live=False)
        self._cell.show("progress", *self._hub.ending(options))
        if self._hub.has_curves:
            self._cell.show("charts", self._hub.charts(options))

    def _publish(self) -> None:
        try:
            self._follow()
        except Exception as error:  # the thread's border: `write` raises it
            self._error = error

    def _follow(self) -> None:
        shown_at = time.monotonic()
        while not self._over.wait(_EVERY_S):
            if self._hub.has_news or time.monotonic() - shown_at >= _ALIVE_S:
                self._cell.show("progress", *self._hub.progress(self._options, has_page=self._has_page))
                shown_at = time.monotonic()
            if self._hub.has_curves and not self._has_page:
                self._cell.show("charts", self._hub.charts(self._options))
                self._has_page = True
