"""What a watcher sees of a run: built from its events alone, bounded in memory, and sent as a snapshot and changes.

No I/O, no clock, no thread: whoever has events may build one, a server, a report or a test.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from events.bounds import AttemptNumber, Int64, UnixTime
from events.health import Health
from events.journal.lines import decoded_bytes
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointStaged,
    CheckpointUploaded,
    CheckpointUploading,
    CommandTaken,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    ObserversReported,
    RunEnded,
    RunResumed,
    RunStarted,
    TestEpochEnded,
    TestEpochStarted,
    TextLogged,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
    WarningLogged,
)
from events.metrics import metric_name
from events.series import SeriesStore, Word, as_json, plain, points_of
from sinks.console.lines import Chronicle
from sinks.console.progress import Progress
from sinks.console.text import Line

MOST_LINES = 1_000
MOST_CHECKPOINTS = 1_000
MOST_OBSERVERS = 200
MOST_MEDIA = 200
MOST_HISTOGRAMS = 200
MOST_OF_A_HISTOGRAM = 50
MOST_COUNTS = 12_800
"""Maximum bins per histogram name, in all steps that are kept."""
MOST_NAME = 300
"""Maximum characters per name; what has a longer one is not shown."""
MOST_REASONS = 20
"""Maximum reasons per checkpoint."""
MOST_LINE = 4_000
"""Maximum characters per line of the log."""
MOST_TEXT = 64 * 1_024
"""Maximum characters per text; the rest is cut."""
MOST_VALUES = 2_000
"""Maximum entries per list or mapping of an event."""
MOST_DETAILS = 100
"""Maximum tracebacks in the log; older ones are removed from their lines."""
MOST_SETTINGS_BYTES = 256 * 1_024
"""Maximum bytes, as JSON, of the arguments, the configuration and the versions, each."""
MOST_SETTINGS_MEMORY = 4 * 2**20
"""Maximum bytes of memory, estimated, of each of these."""
_SETTINGS = frozenset({"arguments", "config", "versions"})
_NAMES = frozenset(
    {
        "run_id",
        "module",
        "device",
        "host",
        "checkpoint",
        "observer",
        "name",
        "key",
        "path",
        "best",
        "monitor",
        "command",
    }
)
_LEVELS: dict[str, Literal["warning", "error"]] = {"warn": "warning", "bad": "error"}
_PLACES: frozenset[type[Event]] = frozenset(
    {
        RunStarted,
        RunResumed,
        RunEnded,
        TrainEpochStarted,
        TrainStepEnded,
        TrainEpochEnded,
        ValEpochStarted,
        ValEpochEnded,
        TestEpochStarted,
        TestEpochEnded,
    }
)
"""Events that say where the run stands. The step of others may be one long past: that of a checkpoint which is saved
now, or of a number that was read late."""


# What a view stores is typed and bounded as it is decoded, for a stranger may have written it.
_Name = Annotated[str, msgspec.Meta(max_length=3 * MOST_NAME)]  # a metric and its dataloader have one each
_Text = Annotated[str, msgspec.Meta(max_length=MOST_TEXT)]
_Value = TypeVar("_Value")
_Few = Annotated[list[_Value], msgspec.Meta(max_length=MOST_VALUES)]
_Named = Annotated[dict[str, _Value], msgspec.Meta(max_length=MOST_VALUES)]


class Summary(msgspec.Struct, omit_defaults=False):
    """A run in a few words. See the module `sinks.live.app` for how it travels."""

    run_id: _Name = ""
    attempt: AttemptNumber = 0
    status: Literal["unknown", "running", "finished", "stopped", "cancelled", "failed", "lost", "damaged"] = "unknown"
    reason: _Text | None = None
    module: _Name = ""
    device: _Name = ""
    host: _Name = ""
    started: UnixTime = 0.0
    updated: UnixTime = 0.0
    """Unix seconds of the newest event: of a run that died, its last sign of life."""
    ended: UnixTime | None = None
    """Unix seconds at which the loop ended; None while it runs, and for a run that died."""
    problems: _Few[_Text] = []
    """The damage, if there is any, and what is unhealthy, as `events.health.Health` finds it."""
    damage: _Name | None = None
    """Why the run's folder cannot be read, or not all of it; None for a sound one. The status is ``damaged`` where that
    leaves it unknown."""
    best: _Name | None = None
    """The metric by which the run keeps its best checkpoints..."""
    best_mode: Literal["min", "max"] = "min"
    """...and whether its least or its greatest value is the best."""
    global_step: Int64 = 0
    epoch: Int64 = 0
    epochs: Int64 | None = None
    steps_per_epoch: Int64 | None = None
    max_steps: Int64 | None = None
    paused: bool = False
    commands: bool = False
    latest: _Named[float | Word] = {}


class LogEntry(msgspec.Struct, omit_defaults=True):
    """A line of the log."""

    seq: Int64
    time: UnixTime
    global_step: Int64
    epoch: Int64
    level: Literal["info", "warning", "error"]
    kind: _Name
    """The type of its event."""
    text: _Text
    detail: _Text | None = None
    """The traceback that belongs to it."""


class Media(msgspec.Struct):
    """An image or a text."""

    name: _Name
    global_step: Int64
    time: UnixTime
    kind: Literal["image", "text"]
    path: _Name | None
    width: Int64 | None = None
    height: Int64 | None = None
    text: _Text | None = None


class Histogram(msgspec.Struct):
    """One step of a histogram."""

    step: Int64
    low: float
    high: float
    counts: _Few[float]


class Upload(msgspec.Struct):
    """What has become of a checkpoint in the store."""

    state: Literal["uploading", "uploaded", "failed", "deleted"]
    done_bytes: Int64 = 0
    total_bytes: Int64 = 0


class Checkpoint(msgspec.Struct):
    """One checkpoint, and what has become of it."""

    name: _Name
    global_step: Int64 = 0
    epoch: Int64 = 0
    time: UnixTime = 0.0
    nbytes: Int64 = 0
    durable_s: float | None = None
    blocked_s: float | None = None
    metric: float | None = None
    reasons: _Few[_Text] = []
    state: Literal["staged", "durable", "failed", "deleted"] = "staged"
    upload: Upload | None = None
    error: _Text | None = None


class Watched(msgspec.Struct):
    """One observer of the run: a sink, a callback, the writers."""

    name: _Name
    state: Literal["ok", "failing", "disabled"] = "ok"
    queued: Int64 | None = None
    lag_s: float | None = None
    dropped: Int64 = 0
    conflated: Int64 = 0
    failures: Int64 = 0
    error: _Text | None = None


class Changes:
    """What some events have changed: the members of a frame."""

    def __init__(self) -> None:
        self.points: dict[str, tuple[list[int], list[float | str]]] = {}
        self.stages: dict[str, str] = {}
        self.log: list[LogEntry] = []
        self.checkpoints: dict[str, Checkpoint] = {}
        self.observers: dict[str, Watched] = {}
        self.media: list[Media] = []
        self.histograms: dict[str, list[Histogram]] = {}
        self.run: dict[str, Any] = {}
        self.count = 0
        """Events in it."""

    def members(self) -> dict[str, Any]:
        """Those that are not empty, as they travel."""
        found = {
            "run": self.run,
            "points": self.points,
            "stages": self.stages,
            "log": self.log,
            "checkpoints": list(self.checkpoints.values()),
            "observers": list(self.observers.values()),
            "media": self.media,
            "histograms": self.histograms,
        }
        return {name: value for name, value in found.items() if value}


_Rows = Annotated[list[Histogram], msgspec.Meta(max_length=MOST_OF_A_HISTOGRAM)]


class RunView(msgspec.Struct, dict=True):
    """The state of one run."""

    run: Summary = msgspec.field(default_factory=Summary)
    arguments: dict[str, Any] = {}
    config: dict[str, Any] = {}
    versions: _Named[_Text] = {}
    curves: SeriesStore = msgspec.field(default_factory=SeriesStore)
    stages: _Named[Literal["val", "test"]] = {}
    """Of the curves that user code logs while it validates or tests: ``val`` or ``test``. Their names are its own."""
    log: Annotated[list[LogEntry], msgspec.Meta(max_length=MOST_LINES)] = []
    checkpoints: Annotated[dict[str, Checkpoint], msgspec.Meta(max_length=MOST_CHECKPOINTS)] = {}
    observers: Annotated[dict[str, Watched], msgspec.Meta(max_length=MOST_OBSERVERS)] = {}
    media: Annotated[list[Media], msgspec.Meta(max_length=MOST_MEDIA)] = []
    histograms: Annotated[dict[str, _Rows], msgspec.Meta(max_length=MOST_HISTOGRAMS)] = {}

    def __post_init__(self) -> None:
        # Beside the fields: they are no part of what is stored.
        self._progress = Progress()
        self._progress.epochs = self.run.epochs  # of one that was stored
        self._chronicle = Chronicle(self._progress)
        self._detailed: deque[LogEntry] = deque(entry for entry in self.log if entry.detail is not None)
        self.is_broken = False
        """Whether reading has ended at the damage, so that what follows is missing."""
        self.health = Health()
        self._readers: dict[type[Event], Callable[[Any, Changes], None]] = {
            RunStarted: self._started,
            RunResumed: self._resumed,
            RunEnded: self._ended,
            TrainEpochStarted: self._epoch_started,
            CommandTaken: self._command,
            MetricsLogged: self._metrics,
            CheckpointStaged: self._staged,
            CheckpointSaved: self._saved,
            CheckpointFailed: self._failed,
            CheckpointUploading: self._uploading,
            CheckpointUploaded: self._uploaded,
            CheckpointDeleted: self._deleted,
            ObserverFailed: self._observer_failed,
            ObserverRecovered: self._observer_recovered,
            ObserverDropped: self._observer_dropped,
            ObserversReported: self._observers_reported,
            HistogramLogged: self._histogram,
            ImageLogged: self._image,
            TextLogged: self._text,
        }

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that is in it."""
        return self.curves.cursor

    @property
    def is_sound(self) -> bool:
        """Whether this one, which was stored, is within all bounds: a stranger may have written it."""
        return (
            self.stages.keys() <= self.curves.series.keys()
            and self.run.latest.keys() <= self.curves.series.keys()
            and all(_settings(one) is one for one in (self.arguments, self.config, self.versions))
            and self.curves.is_sound
            and all(sum(len(row.counts) for row in rows) <= MOST_COUNTS for rows in self.histograms.values())
            and all(name == one.name for name, one in self.checkpoints.items())
            and all(name == one.name for name, one in self.observers.items())
        )

    def damaged(self, reason: str | None, *, is_broken: bool = False) -> None:
        """Note what cannot be read of the run's folder; None changes nothing."""
        if reason is None:
            return
        self.is_broken = self.is_broken or is_broken
        self.run.damage = reason
        self.run.problems = self.problems
        if self.run.status in ("unknown", "lost"):
            self.run.status = "damaged"

    @property
    def problems(self) -> list[str]:
        """The damage, and what is unhealthy about the run. A damage of the journal counts the events that are lost."""
        if not self.run.damage:
            return self.health.problems
        gaps = "the journal lacks" if self.run.damage.startswith("journal/") else damage_line("")
        return [damage_line(self.run.damage), *(one for one in self.health.problems if not one.startswith(gaps))]

    def add(self, events: Sequence[Event], changes: Changes | None = None) -> None:
        """Take events in their order; what they change is added to ``changes``, if somebody wants to know."""
        if not events:
            return
        before = msgspec.structs.asdict(self.run)
        told = changes if changes is not None else Changes()
        told.count += len(events)
        self.curves.add(events)
        if steps := [event for event in events if type(event) is TrainStepEnded]:
            self._progress.take_steps(steps)
        for event in events:
            if changes is not None:
                self._add_points(event, changes)
            if type(event) is not TrainStepEnded:
                self._read(event, told)
        del self.log[:-MOST_LINES]
        last = events[-1]
        self.run.updated = last.time
        self.run.problems = self.problems
        self.run.run_id = self.run.run_id or last.run_id  # whatever of it was lost, it has a name
        place = next((event for event in reversed(events) if type(event) in _PLACES), None)
        if place is not None:
            self.run.global_step, self.run.epoch = place.global_step, place.epoch
        self.run.latest = {name: as_json(series.last) for name, series in self.curves.series.items()}
        after = msgspec.structs.asdict(self.run)
        del after["latest"]  # whoever follows has it from the points
        told.run.update({name: value for name, value in after.items() if value != before[name]})

    def _read(self, event: Event, changes: Changes) -> None:
        reader = self._readers.get(type(event))
        if reader is not None:
            reader(event, changes)
        self._progress.take(event)
        self.health.add(event)
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
                text=line.text[:MOST_LINE],
            )
            if detail and graves and line is graves[-1]:
                entry.detail = detail
                self._detailed.append(entry)
                while len(self._detailed) > MOST_DETAILS:
                    self._detailed.popleft().detail = None
            self.log.append(entry)
            changes.log.append(entry)

    def snapshot(self) -> dict[str, Any]:
        """All of it, as it travels."""
        return {
            "type": "snapshot",
            "cursor": self.cursor,
            "attempt": self.run.attempt,
            "run": self.run,
            "arguments": self.arguments,
            "config": self.config,
            "versions": self.versions,
            "series": {name: plain(series) for name, series in self.curves.series.items()},
            "stages": self.stages,
            "log": self.log,
            "checkpoints": list(self.checkpoints.values()),
            "observers": list(self.observers.values()),
            "media": self.media,
            "histograms": self.histograms,
        }

    def _add_points(self, event: Event, changes: Changes) -> None:
        for name, value in points_of(event):
            if name in self.curves.series:  # so there are no more names than curves
                steps, values = changes.points.setdefault(name, ([], []))
                steps.append(event.global_step)
                values.append(as_json(value))

    # ------------------------------------------------------------------------------------------ the run

    def _started(self, e: RunStarted, changes: Changes) -> None:
        first = self.run.started or e.time
        self.run = Summary(
            run_id=e.run_id,
            attempt=e.attempt,
            status="running",
            module=e.module,
            device=e.device,
            host=e.host,
            started=first,
            best=e.best,
            best_mode=e.best_mode,
            global_step=e.global_step,
            epochs=e.epochs,
            steps_per_epoch=e.steps_per_epoch,
            max_steps=e.max_steps,
            commands=self.run.commands,
            damage=self.run.damage,
            latest=self.run.latest,
        )
        self.arguments, self.config, self.versions = e.arguments, e.config, e.versions

    def _resumed(self, e: RunResumed, changes: Changes) -> None:
        self.run.global_step = e.global_step

    def _ended(self, e: RunEnded, changes: Changes) -> None:
        self.run.status, self.run.reason, self.run.paused = e.status, e.reason, False
        self.run.ended = e.time

    def _epoch_started(self, e: TrainEpochStarted, changes: Changes) -> None:
        self.run.steps_per_epoch = e.steps if e.steps is not None else self.run.steps_per_epoch

    def _command(self, e: CommandTaken, changes: Changes) -> None:
        if e.command in ("pause", "resume", "stop"):
            self.run.paused = e.command == "pause"

    def _metrics(self, e: MetricsLogged, changes: Changes) -> None:
        if e.stage not in ("val", "test"):
            return
        for logged in e.metrics:
            name = metric_name(logged, e.key)
            # Only of what has a curve: so there are no more of them than curves.
            if name not in self.stages and name in self.curves.series:
                self.stages[name] = changes.stages[name] = e.stage

    # ---------------------------------------------------------------------------------------- checkpoints

    def _checkpoint(self, name: str, changes: Changes) -> Checkpoint:
        found = self.checkpoints.get(name)
        if found is None:
            found = self.checkpoints[name] = Checkpoint(name)
            while len(self.checkpoints) > MOST_CHECKPOINTS:
                del self.checkpoints[next(iter(self.checkpoints))]
        changes.checkpoints[name] = found
        return found

    def _staged(self, e: CheckpointStaged, changes: Changes) -> None:
        one = self._checkpoint(e.checkpoint, changes)
        one.global_step, one.epoch, one.time, one.nbytes = e.global_step, e.epoch, e.time, e.nbytes
        one.blocked_s, one.metric, one.reasons, one.state = e.blocked_s, e.metric, e.reasons[:MOST_REASONS], "staged"

    def _saved(self, e: CheckpointSaved, changes: Changes) -> None:
        one = self._checkpoint(e.checkpoint, changes)
        one.global_step, one.epoch, one.time, one.nbytes = e.global_step, e.epoch, one.time or e.time, e.nbytes
        one.durable_s, one.metric, one.reasons, one.state = e.durable_s, e.metric, e.reasons[:MOST_REASONS], "durable"

    def _failed(self, e: CheckpointFailed, changes: Changes) -> None:
        if e.checkpoint:
            one = self._checkpoint(e.checkpoint, changes)
            one.error = e.error[:MOST_LINE]
            if e.during == "upload":
                one.upload = _upload_of(one, "failed")
            elif e.during in ("stage", "write"):
                one.state, one.global_step, one.time = "failed", e.global_step, e.time

    def _uploading(self, e: CheckpointUploading, changes: Changes) -> None:
        self._checkpoint(e.checkpoint, changes).upload = Upload("uploading", e.done_bytes, e.total_bytes)

    def _uploaded(self, e: CheckpointUploaded, changes: Changes) -> None:
        self._checkpoint(e.checkpoint, changes).upload = Upload("uploaded", e.nbytes, e.nbytes)

    def _deleted(self, e: CheckpointDeleted, changes: Changes) -> None:
        if e.checkpoint not in self.checkpoints:
            return
        one = self._checkpoint(e.checkpoint, changes)
        if e.where == "local":
            one.state = "deleted"
        else:
            one.upload = _upload_of(one, "deleted")

    # ------------------------------------------------------------------------------------------ observers

    def _observer(self, name: str, changes: Changes) -> Watched:
        found = self.observers.get(name)
        if found is None:
            found = self.observers[name] = Watched(name)
            while len(self.observers) > MOST_OBSERVERS:
                del self.observers[next(iter(self.observers))]
        changes.observers[name] = found
        return found

    def _observer_failed(self, e: ObserverFailed, changes: Changes) -> None:
        one = self._observer(e.observer, changes)
        one.state = "failing" if e.action == "retrying" else "disabled"
        one.failures, one.error = one.failures + 1, e.error[:MOST_LINE]

    def _observer_recovered(self, e: ObserverRecovered, changes: Changes) -> None:
        self._observer(e.observer, changes).state = "ok"

    def _observer_dropped(self, e: ObserverDropped, changes: Changes) -> None:
        one = self._observer(e.observer, changes)
        one.dropped, one.conflated = one.dropped + e.dropped, one.conflated + e.conflated

    # ----------------------------------------------------------------------------------------------- media

    def _observers_reported(self, e: ObserversReported, changes: Changes) -> None:
        for health in e.observers:
            one = self._observer(health.observer, changes)
            one.state, one.queued, one.lag_s = health.state, health.queued, health.lag_s
            one.dropped, one.conflated = health.dropped, health.conflated

    def _histogram(self, e: HistogramLogged, changes: Changes) -> None:
        name = metric_name(e.name, e.key)
        if not e.counts or (name not in self.histograms and len(self.histograms) >= MOST_HISTOGRAMS):
            return
        one = Histogram(e.global_step, e.low, e.high, e.counts)
        self.histograms.setdefault(name, []).append(one)
        del self.histograms[name][: -max(1, min(MOST_OF_A_HISTOGRAM, MOST_COUNTS // len(e.counts)))]
        changes.histograms.setdefault(name, []).append(one)

    def _image(self, e: ImageLogged, changes: Changes) -> None:
        self._add_media(e, changes, "image", width=e.width, height=e.height)

    def _text(self, e: TextLogged, changes: Changes) -> None:
        self._add_media(e, changes, "text", text=e.text)

    def _add_media(
        self, e: ImageLogged | TextLogged, changes: Changes, kind: Literal["image", "text"], **rest: Any
    ) -> None:
        one = Media(metric_name(e.name, e.key), e.global_step, e.time, kind, e.path, **rest)
        self.media.append(one)
        del self.media[:-MOST_MEDIA]
        changes.media.append(one)


def _detail_of(event: Event) -> str | None:
    """The traceback that belongs to an event's line in the log."""
    if isinstance(event, RunEnded):
        return event.traceback
    return event.exception if isinstance(event, WarningLogged) else None


def _is_of_traceback(line: Line) -> bool:
    """Whether the console shows a row of a traceback by it. Here all of that is with the line that it belongs to."""
    return len(line.fields) == 1 and line.fields[0][0].style == "dim"


def _upload_of(one: Checkpoint, state: Literal["failed", "deleted"]) -> Upload:
    done = one.upload or Upload(state, 0, one.nbytes)
    return msgspec.structs.replace(done, state=state)


def damage_line(reason: str) -> str:
    """The problem that names a damage."""
    return f"the run's folder is damaged: {reason}"


def trimmed(events: Sequence[Event]) -> Sequence[Event]:
    """Events without what is larger than a view shows; nearly always those that were given.

    Called before the lock of a view is taken: one line of a journal may hold a hundred thousand names.
    """
    if all(type(event) is TrainStepEnded or not _is_large(event) for event in events):
        return events
    return [_cut(event) if _is_large(event) else event for event in events]


def _is_large(event: Event) -> bool:
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            if len(value) > MOST_TEXT or (len(value) > MOST_NAME + 1 and name in _NAMES):
                return True
        elif isinstance(value, (list, dict)) and value:
            if len(value) > MOST_VALUES or name in _SETTINGS:
                return True
            if any(isinstance(part, str) and len(part) > MOST_NAME for part in value):
                return True
    return False


def _cut(event: Event) -> Event:
    fields: dict[str, Any] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            # One character more, so that an identity that was cut is not taken for a whole one.
            fields[name] = value[: MOST_NAME + 1 if name in _NAMES else MOST_TEXT]
        elif name in _SETTINGS and isinstance(value, dict):
            fields[name] = _settings(value)
        elif isinstance(value, dict):
            few = list(itertools.islice(value.items(), MOST_VALUES))
            fields[name] = {key: part for key, part in few if not (isinstance(key, str) and len(key) > MOST_NAME)}
        elif isinstance(value, list) and name == "counts" and len(value) > MOST_VALUES:
            fields[name] = []  # a part of a histogram is wrong
        elif isinstance(value, list):
            fields[name] = [part[:MOST_NAME] if isinstance(part, str) else part for part in value[:MOST_VALUES]]
    return msgspec.structs.replace(event, **fields)


def _settings(value: dict[str, Any]) -> dict[str, Any]:
    try:
        data = msgspec.json.encode(value, enc_hook=str)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {"(not shown)": "it is nested too deep, or is not text"}
    if len(data) > MOST_SETTINGS_BYTES:
        return {"(not shown)": f"it has {len(data):,} bytes"}
    if (size := decoded_bytes(data)) > MOST_SETTINGS_MEMORY:
        return {"(not shown)": f"it may take {size:,} bytes of memory"}
    return value
