"""The stall ledger: where the loop's time goes, measured on the loop's own clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter_ns as clock
from time import thread_time_ns as cpu_clock
from typing import Any

import torch

from events.messages import StallLedger

_ROWS = (
    "compute",
    "contention",
    "data",
    "readback",
    "publish",
    "inline",
    "fence",
    "backpressure",
    "checkpoint",
    "paused",
)
_GAP_NS = 100_000
"""When more than this lies between the model's part of two steps, the loop may have waited there for something else."""


class Ledger:
    """Nanoseconds per row. The loop's thread adds to the rows as it goes; nobody else writes.

    ``idle`` measures the device's idle time, on CUDA; elsewhere it is None. ``aside`` is the sum of what code within
    somebody else's row has charged to rows of its own: who measures around that code takes the difference off.

    What the loop waits for the interpreter lock, nothing tells. An estimate from above: while the model computes, how
    much of the time the loop's thread was not on a processor, and no more than the run's other threads were.

    Args:
        others_ns: CPU time of the run's other threads so far.
    """

    __slots__ = (
        "_base",
        "_base_idle_s",
        "_base_wall",
        "_others",
        "_others_ns",
        "_ran",
        "_ran_at",
        "_started",
        "_stood",
        *_ROWS,
        "aside",
        "idle",
        "steps",
    )

    def __init__(self, device: torch.device, others_ns: Callable[[], int]) -> None:
        self._others_ns = others_ns
        self._others = self._stood = self._ran = self._ran_at = self.contention = 0
        self.compute = self.data = self.readback = self.publish = 0
        self.inline = self.fence = self.backpressure = self.checkpoint = self.paused = 0
        self.steps = self.aside = 0
        self.idle = DeviceIdle(device) if device.type == "cuda" else None
        self._started = self._base_wall = clock()
        self._base = (0,) * (len(_ROWS) + 1)
        self._base_idle_s = 0.0

    def start(self) -> None:
        """The loop begins now; what was measured before is forgotten."""
        for row in (*_ROWS, "steps", "aside"):
            setattr(self, row, 0)
        self._stood = self._ran_at = 0
        self._others = self._others_ns()
        self._started = self._base_wall = clock()

    def begin_compute(self, now: int) -> None:
        """The model's part of a step begins at ``now``."""
        if now - self._ran_at > _GAP_NS:  # else it is enough to have looked when the last one ended
            self._ran_at, self._ran = now, cpu_clock()

    def end_compute(self, begin: int, now: int, aside: int) -> None:
        """It ends.

        Args:
            begin: When it began.
            aside: What `aside` was then.
        """
        aside = self.aside - aside
        ran = cpu_clock()
        self.compute += now - begin - aside
        stood = now - self._ran_at - (ran - self._ran)
        self._stood += stood if not aside else max(0, stood - aside)  # as if all of that had been waiting
        self._ran_at, self._ran = now, ran

    def _settle(self) -> None:
        """Take the contention since the last call out of the model's row."""
        others = self._others_ns()
        contention = max(0, min(self._stood, others - self._others, self.compute))
        self.contention += contention
        self.compute -= contention
        self._stood, self._others = 0, others

    def interval(self) -> StallLedger:
        """The rows since the last call."""
        self._settle()
        now = clock()
        values = self._values()
        idle_s = self.idle.read() if self.idle is not None else None
        spent = [value - base for value, base in zip(values, self._base, strict=True)]
        ledger = _ledger(spent, now - self._base_wall, None if idle_s is None else idle_s - self._base_idle_s)
        self._base, self._base_wall, self._base_idle_s = values, now, idle_s or 0.0
        return ledger

    def total(self) -> StallLedger:
        """The rows since `start`."""
        self._settle()
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
