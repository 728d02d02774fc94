"""The stall ledger: where the loop's time goes, measured on the loop's own clock."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter_ns as clock
from time import thread_time_ns as cpu_clock
from typing import Any, Literal

import torch

from events.messages import StallLedger

Row = Literal[
    "compute", "data", "readback", "publish", "inline", "fence", "backpressure", "checkpoint", "paused", "other"
]
_ROWS: tuple[Row, ...] = (
    "compute",
    "data",
    "readback",
    "publish",
    "inline",
    "fence",
    "backpressure",
    "checkpoint",
    "paused",
    "other",
)

_WORKING = frozenset({"compute", "contention", "data", "inline", "publish", "other"})


class Ledger:
    """A stopwatch over rows: each nanosecond of the loop belongs to exactly one.

    Only the thread of the loop switches it.

    How long the loop waits for the interpreter lock cannot be measured. It is estimated from above, as the row
    ``contention``: the time in ``compute`` that the thread of the loop was off the CPU, at most as long as the other
    threads of the run were on it.

    Attributes:
        row: The row that the time is charged to at present.
        since: When the row was switched to, on ``perf_counter_ns``.
        steps: Optimizer steps so far.
        idle: The device's idle time, on CUDA; None elsewhere.

    Args:
        others_ns: Returns the CPU time of the run's other threads so far.
    """

    __slots__ = (
        "_base",
        "_others",
        "_others_ns",
        "_ran",
        "_settled",
        "_spent",
        "_stood",
        "idle",
        "row",
        "since",
        "steps",
    )

    def __init__(self, device: torch.device, others_ns: Callable[[], int]) -> None:
        self._others_ns = others_ns
        self.idle = DeviceIdle(device) if device.type == "cuda" else None
        self.start()

    def start(self) -> None:
        """Start to measure, in the row ``other``, from zero."""
        self.row: Row = "other"
        self.steps = 0
        self._spent: dict[str, int] = {**dict.fromkeys(_ROWS, 0), "contention": 0}
        self._ran = 0  # CPU time of this thread when it began to compute
        self._stood = 0  # time off the CPU since the last report, while computing
        self._settled = 0  # time spent computing up to the last report
        self._others = self._others_ns()
        self._base = StallLedger()
        self.since = clock()

    def enter(self, row: Row) -> Row:
        """Charge the time from now on to a row; returns the row that it was charged to before."""
        now, before = clock(), self.row
        self._spent[before] += now - self.since
        if before == "compute":
            ran = cpu_clock()
            self._stood += now - self.since - (ran - self._ran)
            self._ran = ran
        elif row == "compute":
            self._ran = cpu_clock()
        self.since, self.row = now, row
        return before

    @contextlib.contextmanager
    def within(self, row: Row) -> Iterator[None]:
        """Charge the time of a block to a row, and after it to the row before."""
        before = self.enter(row)
        try:
            yield
        finally:
            self.enter(before)

    def interval(self) -> StallLedger:
        """The rows since the last call."""
        total, before = self.total(), self._base
        self._base = total
        return difference(total, before)

    def glance(self) -> StallLedger:
        """The rows since `start`, to within microseconds, with contention not yet estimated. Any thread."""
        while True:
            since, row, spent = self.since, self.row, dict(self._spent)
            if self.since == since:  # else the loop has switched rows meanwhile
                break
        spent[row] += clock() - since
        rows: dict[str, Any] = {f"{row}_s": ns / 1e9 for row, ns in spent.items()}
        return StallLedger(wall_s=sum(spent.values()) / 1e9, steps=self.steps, **rows)

    def working_ns(self) -> int:
        """Return the time so far in which the loop did not wait for hooks, numbers or room. The loop's thread."""
        spent = self._spent  # written out: it is called in each step
        done = spent["compute"] + spent["contention"] + spent["data"] + spent["inline"] + spent["publish"]
        done += spent["other"]
        return done + clock() - self.since if self.row in _WORKING else done

    def total(self) -> StallLedger:
        """The rows since `start`."""
        self.enter(self.row)
        others = self._others_ns()
        computed = self._spent["compute"] - self._settled
        contention = max(0, min(self._stood, others - self._others, computed))
        self._spent["contention"] += contention
        self._spent["compute"] -= contention
        self._settled, self._stood, self._others = self._spent["compute"], 0, others
        rows: dict[str, Any] = {f"{row}_s": spent / 1e9 for row, spent in self._spent.items()}
        idle_s = self.idle.read() if self.idle is not None else None
        return StallLedger(wall_s=sum(self._spent.values()) / 1e9, device_idle_s=idle_s, steps=self.steps, **rows)


def difference(total: StallLedger, before: StallLedger) -> StallLedger:
    fields = {
        name: value - (getattr(before, name) or 0)
        for name in total.__struct_fields__
        if (value := getattr(total, name)) is not None
    }
    return StallLedger(**fields)


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
        """Exclude the time from now on from steps and idle time."""
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
