"""The view of a run with one client, the page in a cell: its messages are made on the thread that sends them."""

from __future__ import annotations

import time

from sinks.live.frames import encode
from sinks.live.hub import Hub
from sinks.live.view import Changes
from sinks.notebook.content import (
    FILES,
    MOST_MESSAGE,
    Options,
    charts_html,
    end_html,
    message_of,
    progress_html,
    progress_text,
    reduced,
)

_FRAMES_BYTES = 2_000_000
"""Bytes of frames after which a snapshot takes their place in the browser, which keeps all since the last one."""


class CellHub(Hub):
    """A hub whose events are fed on one thread, and whose HTML is made on another one."""

    _frames_bytes = 0

    @property
    def has_news(self) -> bool:
        """Whether the view has changed since the last message."""
        return self.view.cursor != self._sent_cursor or self._is_new

    @property
    def has_curves(self) -> bool:
        """Whether the run has trained, so that there are charts to show."""
        return "train_loss" in self.view.curves.series

    def charts(self, options: Options) -> str:
        """Return the page with the run in it; the messages of `progress` continue it."""
        with self._lock:
            self._begin()
            return charts_html(self.view, options)

    def progress(self, options: Options, *, has_page: bool) -> tuple[str, str]:
        """Return the progress, with the message for the page if there is one; and the progress as plain text."""
        with self._lock:
            return progress_html(self.view, options, self._next() if has_page else None), progress_text(self.view)

    def ending(self, options: Options) -> tuple[str, str]:
        """Return the card of a run that has ended, and its last progress as plain text."""
        with self._lock:
            self.view.run.settle(is_held=False)
            return end_html(self.view, options), f"{self.view.run.status}: {progress_text(self.view)}"

    def _begin(self) -> None:
        self._changes, self._is_new, self._frames_bytes = Changes(), False, 0
        self._sent_cursor = self.view.cursor
        self.view.run.commands = self.takes_commands

    def _next(self) -> bytes:
        self._has_news()  # sets whether commands are taken
        if self._changes is not None and not self._is_new and self._frames_bytes <= _FRAMES_BYTES:
            frame = self._frame(self._changes)
            if len(frame) <= MOST_MESSAGE:
                self._changes = Changes()
                self._sent_cursor = self.view.cursor
                self._frames_bytes += len(frame)
                return frame
        self._begin()
        return message_of(self.view)

    def _frame(self, changes: Changes) -> bytes:
        members = changes.members()
        members["points"] = reduced(changes.points)
        members["media"] = [one for one in changes.media if one.kind not in FILES]
        return encode({"type": "frame", "cursor": self.view.cursor, "time": time.time(), **members})
