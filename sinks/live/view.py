"""The view of a run: built from its events alone, bounded in memory, and sent as a snapshot and changes.

It does no I/O and reads no clock: a server, a report or a test builds one from events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from events.bounds import MAX_LINE_CHARS, BoundDict, BoundList, BoundName, BoundText, Count, Int64, UnixTime
from events.health import ObserverState
from events.messages import (
    AudioLogged,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ObserversReported,
    RankReported,
    RunEnded,
    RunResumed,
    TableLogged,
    TextLogged,
    WarningLogged,
)
from events.metrics import metric_name
from events.ranks import RankState
from events.run.damage import damage_line
from events.run.state import RunState
from events.run.summary import CheckpointState
from events.run.trim import shown_settings
from sinks.console.lines import Chronicle
from sinks.console.text import Line
from sinks.live.series import SeriesStore, as_json, plain, points_of

MAX_LINES = 1_000
MAX_MEDIA = 200
MAX_HISTOGRAMS = 200
MAX_STEPS_OF_A_HISTOGRAM = 50
MAX_COUNTS = 12_800
"""Maximum bins per histogram name, in all steps that are kept."""
MAX_DETAILS = 100
"""Maximum tracebacks in the log; older ones are removed from their lines."""
_LEVELS: dict[str, Literal["warning", "error"]] = {"warn": "warning", "bad": "error"}


class LogEntry(msgspec.Struct, omit_defaults=True):
    """A line of the log."""

    seq: Int64
    time: UnixTime
    global_step: Int64
    epoch: Int64
    level: Literal["info", "warning", "error"]
    kind: BoundName
    """The type of its event."""
    text: BoundText
    detail: BoundText | None = None
    """The traceback that belongs to it."""


class MediaEntry(msgspec.Struct):
    """An image, a sound, a table or a text."""

    name: BoundName
    global_step: Int64
    time: UnixTime
    kind: Literal["image", "audio", "table", "text"]
    path: BoundName | None
    width: Int64 | None = None
    height: Int64 | None = None
    text: BoundText | None = None


class HistogramStep(msgspec.Struct, omit_defaults=True):
    """One step of a histogram."""

    step: Int64
    low: float
    high: float
    counts: BoundList[float]
    skipped: Count = 0
    """Steps before it that were logged, but are not kept."""


class Changes(msgspec.Struct):
    """The members of a frame: all changes of the view by some events."""

    run: dict[str, object] = {}
    points: dict[str, tuple[list[int], list[float | str]]] = {}
    stages: dict[str, str] = {}
    log: list[LogEntry] = []
    checkpoints: dict[str, CheckpointState] = {}
    observers: dict[str, ObserverState] = {}
    ranks: dict[int, RankState] = {}
    media: list[MediaEntry] = []
    histograms: dict[str, list[HistogramStep]] = {}
    left_out: int = 0
    """Values so far under names beyond the maximum number of curves; 0 if these events have none."""
    count: int = 0
    """Events in it."""

    def members(self) -> dict[str, object]:
        """Return the members that are not empty, as a frame holds them."""
        found = msgspec.structs.asdict(self)
        del found["count"]
        found |= {name: list(found[name].values()) for name in ("checkpoints", "observers", "ranks")}
        return {name: value for name, value in found.items() if value}


_Rows = Annotated[list[HistogramStep], msgspec.Meta(max_length=MAX_STEPS_OF_A_HISTOGRAM)]


class RunView(RunState, dict=True):
    """The state of a run, with the curves, log, media and histograms of its page.

    A stored view is untrusted: all of it is typed and bounded as it is decoded.
    """

    curves: SeriesStore = msgspec.field(default_factory=SeriesStore)
    stages: BoundDict[Literal["val", "test"]] = msgspec.field(default_factory=dict)
    """``val`` or ``test``, by the name of a curve that user code logs in that stage under a name of its own."""
    log: Annotated[list[LogEntry], msgspec.Meta(max_length=MAX_LINES)] = msgspec.field(default_factory=list)
    media: Annotated[list[MediaEntry], msgspec.Meta(max_length=MAX_MEDIA)] = msgspec.field(default_factory=list)
    histograms: Annotated[dict[str, _Rows], msgspec.Meta(max_length=MAX_HISTOGRAMS)] = msgspec.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not fields, so that they are not stored.
        self._chronicle = Chronicle(self)
        self._detailed: deque[LogEntry] = deque(entry for entry in self.log if entry.detail is not None)
        self.is_broken = False
        """Whether reading has ended at the damage, so that later events are missing."""

    @property
    def cursor(self) -> int:
        """``seq`` of its last event."""
        return self.curves.cursor

    @property
    def is_sound(self) -> bool:
        """Whether its parts are consistent; a stored view may have been altered."""
        return (
            self.stages.keys() <= self.curves.series.keys()
            and self.run.latest.keys() <= self.curves.series.keys()
            and all(shown_settings(one) is one for one in (self.arguments, self.config, self.versions))
            and self.curves.is_sound
            and all(sum(len(row.counts) for row in rows) <= MAX_COUNTS for rows in self.histograms.values())
            and all(name == one.name for name, one in self.checkpoints.items())
        )

    def damaged(self, reason: str | None, *, is_broken: bool = False) -> None:
        """Set the damage of the run folder; None changes nothing."""
        if reason is None:
            return
        self.is_broken = self.is_broken or is_broken
        self.run.damage = reason
        self.run.problems = self.problems
        self.run.settle(is_held=self.run.status == "running")

    @property
    def problems(self) -> list[str]:
        """The damage, then the problems of the run's health. A damage of the journal includes the lost events."""
        if not self.run.damage:
            return self.health.problems
        gaps = "the journal lacks" if self.run.damage.startswith("journal/") else damage_line("")
        return [damage_line(self.run.damage), *(one for one in self.health.problems if not one.startswith(gaps))]

    def add(self, events: Sequence[Event], changes: Changes | None = None) -> None:
        """Add events in their order; their changes are added to ``changes``, if given."""
        if not events:
            return
        before = msgspec.structs.asdict(self.run)
        changed = changes if changes is not None else Changes()
        changed.count += len(events)
        left_out = self.curves.left_out
        self.curves.add(events)
        if changes is not None:
            self._add_points(events, changes)
            if self.curves.left_out > left_out:
                changes.left_out = self.curves.left_out
        for event in self.follow(events):
            self._add_media(event, changed)
            self._add_lines(event, changed)
            self._note(event, changed)
        del self.log[:-MAX_LINES]
        last, run = events[-1], self.run
        run.updated = last.time
        run.problems = self.problems
        run.run_id = run.run_id or last.run_id  # its first events may be lost
        run.latest = {name: as_json(series.last) for name, series in self.curves.series.items()}
        after = msgspec.structs.asdict(run)
        del after["latest"]  # clients have it from the points
        changed.run.update({name: value for name, value in after.items() if value != before[name]})

    def snapshot(self) -> dict[str, object]:
        """Return the first message to a client."""
        return {
            "type": "snapshot",
            "cursor": self.cursor,
            "attempt": self.run.attempt,
            "run": self.run,
            "arguments": self.arguments,
            "config": self.config,
            "versions": self.versions,
            "series": {name: plain(series) for name, series in self.curves.series.items()},
            "left_out": self.curves.left_out,
            "stages": self.stages,
            "log": self.log,
            "checkpoints": list(self.checkpoints.values()),
            "observers": list(self.observers.values()),
            "ranks": list(self.ranks.values()),
            "media": self.media,
            "histograms": self.histograms,
        }

    def _add_points(self, events: Sequence[Event], changes: Changes) -> None:
        for event in events:
            for name, value in points_of(event):
                if name in self.curves.series:  # which bounds the names
                    steps, values = changes.points.setdefault(name, ([], []))
                    steps.append(event.global_step)
                    values.append(as_json(value))

    def _add_lines(self, event: Event, changes: Changes) -> None:
        detail = _detail_of(event)
        lines = [line for line in self._chronicle.take(event) if not (detail and _is_of_traceback(line))]
        graves = [line for line in lines if line.kind in _LEVELS]
        for line in lines:
            entry = LogEntry(
                seq=event.seq,
                time=line.time,
                global_step=event.global_step,
                epoch=event.epoch,
                level=_LEVELS.get(line.kind, "info"),
                kind=type(event).__name__,
                text=line.text[:MAX_LINE_CHARS],
            )
            if detail and graves and line is graves[-1]:
                entry.detail = detail
                self._detailed.append(entry)
                while len(self._detailed) > MAX_DETAILS:
                    self._detailed.popleft().detail = None
            self.log.append(entry)
            changes.log.append(entry)

    def _note(self, event: Event, changes: Changes) -> None:
        """Note which parts of the state an event has changed."""
        checkpoint = self.checkpoints.get(getattr(event, "checkpoint", None) or "")
        if checkpoint is not None:
            changes.checkpoints[checkpoint.name] = checkpoint
        if isinstance(event, RunResumed):  # it supersedes some of them
            changes.checkpoints.update(self.checkpoints)
        if isinstance(event, RankReported):  # the last one of a round may mark others
            is_last = event.reported_rank == event.ranks - 1
            numbers = list(self.ranks) if is_last else [event.reported_rank]
            changes.ranks.update({number: self.ranks[number] for number in numbers if number in self.ranks})
        named = event.observers if type(event) is ObserversReported else [event]
        for one in named:
            observer = self.observers.get(getattr(one, "observer", ""))
            if observer is not None:
                changes.observers[observer.name] = observer

    def _add_media(self, event: Event, changes: Changes) -> None:
        match event:
            case MetricsLogged(stage="val" | "test" as stage):
                for logged in event.metrics:
                    name = metric_name(logged, event.key)
                    # The curves bound the names.
                    if name not in self.stages and name in self.curves.series:
                        self.stages[name] = changes.stages[name] = stage
            case HistogramLogged(counts=[_, *_]):
                name = metric_name(event.name, event.key)
                if name in self.histograms or len(self.histograms) < MAX_HISTOGRAMS:
                    row = HistogramStep(event.global_step, event.low, event.high, event.counts)
                    rows = self.histograms.setdefault(name, [])
                    rows.append(row)
                    _thin(rows, min(MAX_STEPS_OF_A_HISTOGRAM, MAX_COUNTS // len(event.counts)))
                    changes.histograms.setdefault(name, []).append(row)
            case ImageLogged() | AudioLogged() | TableLogged() | TextLogged():
                one = MediaEntry(metric_name(event.name, event.key), event.global_step, event.time, "text", event.path)
                if isinstance(event, ImageLogged):
                    one.kind, one.width, one.height = "image", event.width, event.height
                elif isinstance(event, AudioLogged):
                    one.kind = "audio"
                elif isinstance(event, TableLogged):
                    one.kind = "table"
                else:
                    one.text = event.text
                self.media.append(one)
                del self.media[:-MAX_MEDIA]
                changes.media.append(one)


def _thin(rows: list[HistogramStep], most: int) -> None:
    """Remove rows until few enough are left: where the steps are densest, and neither the first nor the last, if two
    may stay. The page removes the same ones (``thinned`` in ``rebin.js``)."""
    while len(rows) > max(2, most):
        at = min(range(1, len(rows) - 1), key=lambda at: rows[at + 1].step - rows[at - 1].step)
        gone = rows.pop(at)
        rows[at] = msgspec.structs.replace(rows[at], skipped=rows[at].skipped + gone.skipped + 1)
    if most < 2:
        del rows[:-1]


def _detail_of(event: Event) -> str | None:
    """Return the traceback of an event."""
    if isinstance(event, RunEnded):
        return event.traceback
    return event.exception if isinstance(event, WarningLogged) else None


def _is_of_traceback(line: Line) -> bool:
    """Whether it is a row of a traceback on the console; the page has all rows in the detail of one line."""
    return len(line.fields) == 1 and line.fields[0][0].style == "dim"
