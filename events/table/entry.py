"""The entry of a run in a table of runs, folded from its whole journal."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from events.bounds import MAX_ENTRIES, BoundDict, BoundList, BoundName, BoundText, Count, Int64
from events.health import Health
from events.journal.history import history_filter
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR, journal_head
from events.journal.tail import journal_tail
from events.messages import Event, RunResumed, RunStarted, TrainStepEnded
from events.metrics import hyperparameters, metrics_of
from events.run.damage import add_damage, damage_in, damage_of
from events.run.folder import is_held
from events.run.job import read_job, settle_job
from events.run.pushed import is_pushed
from events.run.state import RunState
from events.run.summary import Summary
from events.run.trim import trimmed
from events.table.notes import Notes
from events.text import plain_text

MOST_DAMAGED = 10_000
"""Maximum lines per journal that are not events; the rest of the journal is not read."""
_HEAD = 64
_GLIMPSE_S = 0.02
_BATCH = 1_024
_TAIL_BYTES = 4_096
_STALE_EPOCHS = 3
"""Epochs without an improvement of the best value that `health` reports."""
_IDLE = 0.3
"""Share of an interval without work of the device that `health` reports."""
_MAX_HEALTH = 20
_GENERATED = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A ``run_id`` that the trainer has chosen, or torchrun."""
_LEAST_WORDS = frozenset({"loss", "nll", "error", "perplexity", "ppl", "wer", "cer", "mae", "mse", "rmse", "fid", "s"})

Scalar = str | int | float | bool | None


class MetricSummary(msgspec.Struct, array_like=True):
    """The values of one metric over a run. Non-finite values count only as the last one."""

    last: float = math.nan
    low: float = math.nan
    """The least finite value, with its step and epoch; NaN without one..."""
    low_step: Int64 = 0
    low_epoch: Int64 = 0
    high: float = math.nan
    """...and the greatest one."""
    high_step: Int64 = 0
    high_epoch: Int64 = 0
    epoch: Int64 = 0
    """Of the last value."""
    bad_since: Int64 | None = None
    """The step since which no value was finite; None if the last one is."""
    is_least_best: bool = True
    """Whether its least value is the best."""

    @property
    def best(self) -> float:
        """The least or the greatest finite value; NaN without one."""
        return self.low if self.is_least_best else self.high

    @property
    def best_step(self) -> int:
        """The first step with the best value."""
        return self.low_step if self.is_least_best else self.high_step

    @property
    def epochs_since_best(self) -> int:
        """Epochs from the best value to the last one."""
        return self.epoch - (self.low_epoch if self.is_least_best else self.high_epoch)

    def add(self, value: float, step: int, epoch: int) -> None:
        """Add a value, in order."""
        self.last, self.epoch = value, epoch
        if not math.isfinite(value):
            self.bad_since = step if self.bad_since is None else self.bad_since
            return
        self.bad_since = None
        if not self.low <= value:
            self.low, self.low_step, self.low_epoch = value, step, epoch
        if not self.high >= value:
            self.high, self.high_step, self.high_epoch = value, step, epoch


class RunEntry(msgspec.Struct):
    """A run in a table of runs: what it was asked, where it is, and what it came to.

    Attributes:
        run: Its state, times, command line and commit.
        config: Its hyperparameters, the trainer's arguments and the user's, flattened: ``optimizer.lr``.
        metrics: The last, least and greatest value under each name of `events.metrics.metrics_of`.
        health: What is unhealthy in a few words each, the gravest first; ``run.problems`` has the sentences.
        left_s: Estimated seconds to the end; None if it is unknown, or the run is over.
    """

    run: Summary = msgspec.field(default_factory=Summary)
    config: BoundDict[BoundText | Int64 | float | bool | None] = {}
    metrics: Annotated[dict[str, MetricSummary], msgspec.Meta(max_length=MAX_ENTRIES)] = {}
    health: BoundList[BoundText] = []
    total_steps: Count | None = None
    left_s: float | None = None
    name: BoundName = ""
    """Its ``run_id``, made unique among the runs of a table."""
    folder: str = ""
    """Its folder, relative to that of the table, with slashes; "." for the folder of the table itself."""
    notes: Notes = Notes()

    @property
    def label(self) -> str:
        """The name that people see: that of the notes, otherwise the folder of a run that nobody named."""
        is_named = self.folder in ("", ".") or _GENERATED.fullmatch(self.name) is None
        return self.notes.name or (self.name if is_named or self.folder.endswith(self.name) else self.folder)

    @property
    def progress(self) -> float | None:
        """Share of its steps that are done, from 0 to 1; None if their number is unknown."""
        return min(1.0, self.run.global_step / self.total_steps) if self.total_steps else None

    @property
    def monitored(self) -> str | None:
        """The metric by which runs are compared: that of its best checkpoint, otherwise its first validation loss."""
        validated = next((name for name in self.metrics if name.partition("/")[0] == "val_loss"), None)
        return next((one for one in (self.run.best, validated, "train_epoch_loss") if one in self.metrics), None)

    def duration_s(self, now: float) -> float | None:
        """Seconds from its start to its end, its last sign of life, or now."""
        run = self.run
        if not run.started:
            return None
        until = max(now, run.updated) if run.status == "running" else (run.ended or run.updated)
        return max(0.0, until - run.started)


class EntryReader:
    """Reads the entry of a run from its journal, which may grow. Belongs to one thread."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._run_dir = Path(run_dir)
        self._journal_dir = self._run_dir / JOURNAL_DIR
        self._head: bytes | None = None

    def _begin(self) -> None:
        self._reader = JournalReader(self._journal_dir)
        self._state = RunState()
        self._metrics: dict[str, MetricSummary] = {}
        self._config: dict[str, Scalar] = {}
        self._updated, self._run_id = 0.0, ""
        tail = journal_tail(self._journal_dir, chunk=_TAIL_BYTES)
        self._glimpsed: Summary | None = None
        self._tail = tail.events
        self._known = tail.seq  # the filter of superseded events knows the resumes up to here
        self._counts = history_filter(self._journal_dir) if tail.attempt > 1 else None
        self.is_behind = True
        """Whether the last call has not reached the end of the journal."""

    def read(self, until: float = math.inf) -> RunEntry:
        """Read new events, and return the entry. Raises `OSError`.

        Args:
            until: Stop soon after this time (`time.monotonic`); the entry then lacks values from the middle of the
                journal, and the next call continues.
        """
        head = journal_head(self._journal_dir)
        if head != self._head:  # the first read, or another run has the folder now
            self._head = head
            self._begin()
        held = is_held(self._run_dir)  # before the read, so that it includes the last event
        is_again = False
        while (events := self._next(until, is_over=not held)) is not None:
            if not is_again and any(type(event) is RunResumed and event.seq > self._known for event in events):
                self._begin()  # without the steps that are repeated
                is_again = True  # once: the end of a crafted journal may contradict its middle
                continue
            self._add(events)
        entry = self._entry()
        if self.is_behind:
            entry.run = self._glimpse()
        run = entry.run
        add_damage(run, damage_of(self._run_dir) or damage_in(self._reader))
        run.settle(is_held=held, is_pushed=is_pushed(self._run_dir))
        settle_job(run, read_job(self._run_dir))
        entry.left_s = self._state.run_left_s if run.status == "running" and not self.is_behind else None
        entry.health = health_of(run, self._metrics, self._state.health)
        return entry

    def _next(self, until: float, *, is_over: bool) -> Sequence[Event] | None:
        """Return events that count, perhaps none; None at the end of the journal, or at the time."""
        if time.monotonic() > until or self._reader.skipped_count > MOST_DAMAGED:
            self.is_behind = self._reader.skipped_count <= MOST_DAMAGED
            return None
        events = self._reader.read(_BATCH, until)
        if not events and is_over and time.monotonic() <= until:
            events = self._reader.finish()
        if not events:
            self.is_behind = time.monotonic() > until
            return None
        self._updated, self._run_id = events[-1].time, self._run_id or events[-1].run_id
        return trimmed(events if self._counts is None else [event for event in events if self._counts(event)])

    def _add(self, events: Sequence[Event]) -> None:
        for event in events:
            if type(event) is RunStarted:
                self._config = flattened(hyperparameters(event))
            if type(event) is not TrainStepEnded:
                for name, value in metrics_of(event):
                    self._put(name, value, event.global_step, event.epoch)
                continue
            step, epoch = event.global_step, event.epoch
            if event.loss is not None:
                self._put("train_loss", event.loss, step, epoch)
            if event.lr is not None:
                self._put("lr", event.lr, step, epoch)
            if event.grad_norm is not None:
                self._put("grad_norm", event.grad_norm, step, epoch)
            self._put("step_s", event.step_s, step, epoch)
        self._state.add(events)

    def _put(self, name: str, value: float, step: int, epoch: int) -> None:
        metric = self._metrics.get(name)
        if metric is None:
            if len(self._metrics) >= MAX_ENTRIES:
                return
            metric = self._metrics[name] = MetricSummary(is_least_best=is_least_best(name))
        metric.add(value, step, epoch)

    def _entry(self) -> RunEntry:
        run = msgspec.structs.replace(self._state.run, updated=self._updated, problems=self._state.health.problems)
        run.run_id = run.run_id or self._run_id  # its first events may be lost
        run.latest = {name: as_json(metric.last) for name, metric in self._metrics.items()}
        if run.best in self._metrics:
            self._metrics[run.best].is_least_best = run.best_mode == "min"
        metrics = {name: msgspec.structs.replace(metric) for name, metric in self._metrics.items()}
        return RunEntry(run, self._config, metrics, total_steps=self._state.total_steps)

    def _glimpse(self) -> Summary:
        """Return the state from the start and the end of a journal that was not read to its end yet."""
        if self._glimpsed is None:
            state = RunState()
            state.add(trimmed(JournalReader(self._journal_dir).read(_HEAD, time.monotonic() + _GLIMPSE_S)))
            state.add(tail := trimmed(self._tail))
            run = self._glimpsed = state.run
            for event in tail:
                run.run_id, run.updated = run.run_id or event.run_id, event.time
                run.latest |= {name: as_json(value) for name, value in metrics_of(event)}
            run.latest = dict(list(run.latest.items())[:MAX_ENTRIES])
        return msgspec.structs.replace(self._glimpsed, problems=self._state.health.problems)


def health_of(run: Summary, metrics: dict[str, MetricSummary], health: Health) -> list[str]:
    """Return what is unhealthy in a few words each, the gravest first, at most 20."""
    found = ["damaged"] if run.damage is not None else []
    found += [
        f"{name} NaN since step {metric.bad_since:,}"
        for name, metric in metrics.items()
        if metric.bad_since is not None and not name.startswith(("system/", "ledger/"))
    ]
    found += [f"{one.name} {one.state}" for one in health.observers.values() if one.state != "ok"]
    found += ["checkpoint failing"] if health.has_failing_checkpoints else []
    if (name := RunEntry(run, metrics=metrics).monitored) is not None:
        epochs = metrics[name].epochs_since_best
        found += [f"{name} not improved for {epochs:,} epochs"] if epochs >= _STALE_EPOCHS else []
    idle, wall = metrics.get("ledger/device_idle_s"), metrics.get("ledger/wall_s")
    if idle is not None and wall is not None and wall.last > 0 and idle.last / wall.last >= _IDLE:
        found.append(f"device idle {idle.last / wall.last:.0%}")
    return [plain_text(one, 200) for one in found[:_MAX_HEALTH]]


def as_json(value: float) -> Any:
    """Return a number for JSON: NaN and infinities as text."""
    return value if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def flattened(values: dict[str, Any]) -> dict[str, Scalar]:
    """Return nested values under dotted names, at most 2,000; a list of plain values is one text."""
    return dict(_pairs(values, ""))


def _pairs(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
    todo = [(prefix, values)]  # not recursive: a crafted journal nests as deep as the decoder allows
    count = 0
    while todo and count < MAX_ENTRIES:
        prefix, inner = todo.pop()
        for name, value in inner.items():
            path = f"{prefix}{name}"[:300]
            if isinstance(value, dict) and value:
                todo.append((f"{path}.", value))
            elif count < MAX_ENTRIES:
                count += 1
                yield path, _scalar(value)


def _scalar(value: object) -> Scalar:
    if value is None or isinstance(value, str | bool | float):
        return value[:4_000] if isinstance(value, str) else value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    return msgspec.json.encode(value).decode()[:4_000]


def is_least_best(name: str) -> bool:
    """Guess from a metric's name, for one that no checkpoint is chosen by: the least loss or time is the best."""
    return not _LEAST_WORDS.isdisjoint(re.split("[^a-z]+", name.lower()))
