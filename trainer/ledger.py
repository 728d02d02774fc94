"""The stall ledger: where the loop's time goes, measured on the loop's own clock."""

from __future__ import annotations

from collections import deque
from time import perf_counter_ns as clock
from typing import Any

import torch

from events.messages import StallLedger

_ROWS = ("compute", "data", "readback", "publish", "inline", "fence", "backpressure", "paused")


class Ledger:
    """Nanoseconds per row. The loop's thread adds to the rows as it goes; nobody else writes.

    ``idle`` measures the device's idle time, on CUDA; elsewhere it is None. ``aside`` is the sum of what code within
    somebody else's row has charged to rows of its own: who measures around that code takes the difference off.
    """

    __slots__ = (
        "_base",
        "_base_idle_s",
        "_base_wall",
        "_started",
        *_ROWS,
        "aside",
        "idle",
        "steps",
    )

    def __init__(self, device: torch.device) -> None:
        self.compute = self.data = self.readback = self.publish = 0
        self.inline = self.fence = self.backpressure = self.paused = 0
        self.steps = self.aside = 0
        self.idle = DeviceIdle(device) if device.type == "cuda" else None
        self._started = self._base_wall = clock()
        self._base = (0,) * (len(_ROWS) + 1)
        self._base_idle_s = 0.0

    def start(self) -> None:
        """The loop begins now; what was measured before is forgotten."""
        for row in (*_ROWS, "steps", "aside"):
            setattr(self, row, 0)
        self._started = self._base_wall = clock()

    def interval(self) -> StallLedger:
        """The rows since the last call."""
        now = clock()
        values = self._values()
        idle_s = self.idle.read() if self.idle is not None else None
        spent = [value - base for value, base in zip(values, self._base, strict=True)]
        ledger = _ledger(spent, now - self._base_wall, None if idle_s is None else idle_s - self._base_idle_s)
        self._base, self._base_wall, self._base_idle_s = values, now, idle_s or 0.0
        return ledger

    def total(self) -> StallLedger:
        """The rows since `start`."""
        now = clock()
        idle_s = self.idle.read() if self.idle is not None else None
        return _ledger(list(self._values()), now - self._started, idle_s)

    def _values(self) -> tuple[int, ...]:
        return (*(getattr(self, row) for row in _ROWS), self.steps)


def _ledger(values: list[int], wall: int, idle_s: float | None) -> StallLedger:
    *rows, steps = values
    named: dict[str, Any] = {f"{row}_s": value / 1e9 for row, value in zip(_ROWS, rows, strict=True)}
    other_s = (wall - sum(rows)) / 1e9
    return StallLedger(wall_s=wall / 1e9, other_s=other_s, device_idle_s=idle_s, steps=steps, **named)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceIdle:
    """Device time between the end of one step's work and the start of the next, from CUDA events.

    The events are recorded on the loop's stream and read once they have happened; nothing here waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last_end: torch.cuda.Event | None = None
        self._gaps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._idle_s = 0.0

    def begin(self) -> None:
        """The device's work of a step begins here."""
        if self._last_end is not None:
            start = self._record()
            self._gaps.append((self._last_end, start))
            self._last_end = None
            if len(self._gaps) > 256:
                self.read()

    def end(self) -> None:
        """The device's work of a step ends here."""
        self._last_end = self._record()

    def forget(self) -> None:
        """What comes now is no step, and no idleness either."""
        if self._last_end is not None:
            self._free.append(self._last_end)
            self._last_end = None

    def read(self) -> float:
        """Seconds of idleness in all gaps that are over by now."""
        while self._gaps and self._gaps[0][1].query():  # type: ignore[no-untyped-call]
            end, start = self._gaps.popleft()
            self._idle_s += max(0.0, end.elapsed_time(start)) / 1e3  # elapsed_time is in milliseconds
            self._free += (end, start)
        return self._idle_s

    def _record(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else _timing_event()
        event.record(torch.cuda.current_stream(self._device))
        return event
