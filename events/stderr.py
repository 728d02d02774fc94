"""Lines on stderr: written on a thread of their own, and identical ones counted."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time

_REPEAT_S = 10.0
"""An identical warning is shown again after this long, with the number of those between."""
_MOST_TEXTS = 256
"""Different warnings that are remembered, to be counted when they come again..."""
_MOST_IN_REPEAT = 100
"""...and most of them that are shown within that time: a flood is counted, not shown."""
_MOST_QUEUED = 1_000
_FLUSH_S = 1.0
_IDLE_S = 0.25


class Stderr:
    """Writes lines to stderr on a thread of its own, because a terminal that is held must not hold a run.

    The thread starts with a line, and ends once none is left. Never raises, whatever ``sys.stderr`` is.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal's handler may log while its own thread holds it
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def put(self, text: str) -> None:
        """Write soon; any thread, waits for nothing. In a forked child, which has no such thread: write now."""
        if self._pid != os.getpid():
            self.write(text)
            return
        with self._lock:
            if self._lines.qsize() < _MOST_QUEUED:
                self._lines.put(text)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="stagecast-stderr", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter ends, or the system has no more threads
                    thread.start()
                    self._thread = thread

    def flush(self, timeout_s: float) -> None:
        """Wait until what was put before is written, no longer than this."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._thread is None:
                while self._write_next(0.0):  # no thread could be started for them
                    pass
                return
            written = threading.Event()
            self._lines.put(written)
        written.wait(timeout_s)

    def _run(self) -> None:
        while True:
            if not self._write_next(_IDLE_S):
                with self._lock:
                    if self._lines.empty():
                        self._thread = None
                        return

    def _write_next(self, timeout_s: float) -> bool:
        """Write what was put first; False if there is nothing."""
        try:
            one = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if isinstance(one, threading.Event):
            one.set()
        else:
            self.write(one)
        return True

    @staticmethod
    def write(text: str) -> None:
        """Write now; may wait for the terminal."""
        stream = sys.stderr
        # A stranger's stream may be closed, None, without `flush`, or of an encoding that lacks some characters.
        for one in (text, text.encode("ascii", "backslashreplace").decode()):
            with contextlib.suppress(Exception):
                stream.write(one)
                break
        with contextlib.suppress(Exception):
            stream.flush()


stderr = Stderr()
atexit.register(lambda: stderr.flush(_FLUSH_S))


def flush_stderr(timeout_s: float = _FLUSH_S) -> None:
    """Wait a moment until what was logged before is on stderr. Not in an event loop: it may wait for a terminal."""
    stderr.flush(timeout_s)


class Repeats:
    """Counts identical warnings, and those beyond what anybody could read. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may log while its own thread holds it
        self._texts: dict[str, tuple[float, int]] = {}
        self._window = 0.0
        self._shown = 0
        self._flood = 0

    def take(self, message: str) -> int | None:
        """How many identical ones were held back before this one; None to hold it back, too."""
        now = time.monotonic()
        with self._lock:
            since, held = self._texts.get(message, (-_REPEAT_S, 0))
            if now - since < _REPEAT_S:
                self._texts[message] = since, held + 1
                return None
            if now - self._window >= _REPEAT_S:
                self._window, self._shown = now, 0
            if self._shown >= _MOST_IN_REPEAT:
                self._flood += 1
                return None
            self._shown += 1
            self._texts.pop(message, None)  # to the end: the first is the one shown longest ago
            self._texts[message] = now, 0
            if len(self._texts) > _MOST_TEXTS:
                _, lost = self._texts.pop(next(iter(self._texts)))
                self._flood += lost
            return held

    def rest(self) -> list[tuple[str, int]]:
        """What was held back since it was last shown, with the counts; a text of its own for the flood."""
        with self._lock:
            held = [(message, count) for message, (_, count) in self._texts.items() if count]
            if self._flood:
                held.append((f"{self._flood:,} more warnings came too fast to be shown", 0))
            self._texts.clear()
            self._flood = 0
            return held
