"""The history of a run that counts, and its events of a few types, read from the journal."""

from __future__ import annotations

import bisect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from events.checkpoint.manifest import CheckpointName
from events.journal.lines import event_of, mended
from events.journal.reader import JournalReader, SkippedLine
from events.journal.segment import SegmentLines, segment_numbers
from events.messages import (
    AudioLogged,
    BackwardEnded,
    Event,
    HistogramLogged,
    ImageLogged,
    LedgerReported,
    MetricsLogged,
    MonitorMissing,
    NonFiniteGradient,
    NonFiniteLoss,
    RunResumed,
    StepSkipped,
    TableLogged,
    TestEpochEnded,
    TestEpochStarted,
    TestStepEnded,
    TextLogged,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
    ValStepEnded,
)
from events.safe_files import UnsafeFile

SUPERSEDED_TYPES: tuple[type[Event], ...] = (
    TrainEpochStarted,
    TrainStepEnded,
    BackwardEnded,
    ValEpochStarted,
    ValStepEnded,
    ValEpochEnded,
    TestEpochStarted,
    TestStepEnded,
    TestEpochEnded,
    TrainEpochEnded,
    MetricsLogged,
    HistogramLogged,
    ImageLogged,
    AudioLogged,
    TableLogged,
    TextLogged,
    MonitorMissing,
    NonFiniteLoss,
    NonFiniteGradient,
    StepSkipped,
    LedgerReported,
)
"""Events that are bound to a step, so that repeating the step replaces them. Events of the run, of observers and of
commands stay, whatever is repeated."""


def read_history(
    journal_dir: str | os.PathLike[str], since: int = 0, skipped: list[SkippedLine] | None = None
) -> Iterator[Event]:
    """The run's history that counts: without the steps that a later attempt has repeated.

    Events of `SUPERSEDED_TYPES` count if the newest attempt published them, or if an earlier one did before the
    checkpoint from which the next one resumed. All other events count. This is the one place that applies `RunResumed`:
    replay, charts and reports read through it.

    Args:
        journal_dir: The folder of segments; it may be growing. The iterator ends when it has caught up.
        since: Events up to this ``seq`` are skipped.
        skipped: Receives the lines that are not events, if given (the newest thousand).

    Raises:
        OSError: A segment exists but cannot be read.
    """
    counts = history_filter(journal_dir)
    reader = JournalReader(journal_dir, since)
    while events := reader.read() or reader.finish():
        yield from filter(counts, events)
    if skipped is not None:
        skipped.extend(reader.skipped)


def history_filter(
    journal_dir: str | os.PathLike[str], between: Callable[[], None] = lambda: None
) -> Callable[[Event], bool]:
    """Return whether an event of a journal, as it is now, belongs to the history that `read_history` returns.

    Args:
        between: Called between two parts of the journal, a mebibyte each, because all of it is read.
    """
    # Read first: the resume that supersedes an event may be at the journal's end.
    kept_up_to = _kept_up_to(_resumes(Path(journal_dir), between))

    def counts(event: Event) -> bool:
        if not isinstance(event, SUPERSEDED_TYPES):
            return True
        seq, step = kept_up_to(event.attempt)
        # A value that a hook logged late belongs to the event that it handled.
        return (getattr(event, "of_seq", None) or event.seq) <= seq and event.global_step <= step

    return counts


def _kept_up_to(resumes: Iterable[RunResumed]) -> Callable[[int], tuple[float, float]]:
    """Return, for an attempt, the maximum ``seq`` and step of its events that count."""
    # Sorted, not in a dictionary by attempt: a crafted journal may have numbers that collide, or that are far apart. Of
    # several resumes of an attempt the last one counts.
    resumes = sorted((resume for resume in resumes if resume.attempt), key=_attempt_of)
    everything = seq, step = math.inf, math.inf
    current = newest = resumes[-1].attempt if resumes else 0
    line: list[tuple[int, int, tuple[float, float]]] = []  # first and last attempt of a stretch with the same bounds
    while current > 0:
        index = bisect.bisect_right(resumes, current, key=_attempt_of) - 1
        if index < 0:
            line.append((1, current, (seq, step)))
            break
        resume = resumes[index]
        line.append((resume.attempt, current, (seq, step)))
        parent = resume.attempt - 1
        if resume.after_seq is None:  # all that is known is the step
            step = min(step, resume.global_step)
        else:
            name = CheckpointName.parse(resume.checkpoint or "")
            seq, step = resume.after_seq, math.inf
            parent = name.attempt if name is not None and resume.after_seq else 0
        current = min(parent, resume.attempt - 1)
    line.reverse()

    def kept(attempt: int) -> tuple[float, float]:
        stretch = line[max(0, bisect.bisect_right(line, attempt, key=_first_of) - 1)] if line else (0, 0, everything)
        if stretch[0] <= attempt <= stretch[1]:
            return stretch[2]
        # One that has resumed nothing has trained nothing: a test. The first one needs not to have.
        index = bisect.bisect_left(resumes, attempt, key=_attempt_of)
        has_resumed = attempt <= newest and resumes[index].attempt == attempt
        return (0, 0) if has_resumed or (attempt == 1 and newest) else everything

    return kept


def _attempt_of(event: Event) -> int:
    return event.attempt


def _first_of(stretch: tuple[int, int, tuple[float, float]]) -> int:
    return stretch[0]


class EventFinder:
    """Finds a journal's events of some types, in order and each once, while it grows. It decodes no other lines.

    Belongs to one thread.
    """

    def __init__(self, journal_dir: str | os.PathLike[str], types: Iterable[type[Event]]) -> None:
        self._dir = Path(journal_dir)
        self._beginnings = tuple(b'{"type":"%s"' % kind.__name__.encode() for kind in types)
        self._segment: SegmentLines | None = None
        self._found_seq = 0

    def find(self, until: float = math.inf, between: Callable[[], None] = lambda: None) -> Iterator[Event]:
        """Return the events behind those that were found before. Raises `OSError` if a segment cannot be read.

        Args:
            until: Stop soon after this time (`time.monotonic`); the next call continues.
            between: Called between two parts of the journal, a mebibyte each.
        """
        for number in segment_numbers(self._dir):
            if self._segment is None or number > self._segment.number:
                self._segment = SegmentLines(self._dir, number)
            if number < self._segment.number:
                continue
            for line in _lines_of(self._segment, until, between):
                event = event_of(line, self._segment.checked) if line.startswith(self._beginnings) else None
                if event is not None and event.seq > self._found_seq:  # the writer repeats resumes
                    self._found_seq = event.seq
                    yield event
            if until < math.inf and time.monotonic() > until:
                return


def _lines_of(
    segment: SegmentLines, until: float = math.inf, between: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """The whole lines that follow in a segment; none of one that is gone, or is not a regular file."""
    try:
        while lines := segment.read():
            yield from (line for line in lines if isinstance(line, bytes))
            between()
            if until < math.inf and time.monotonic() > until:
                return
    except (FileNotFoundError, UnsafeFile):
        return  # removed since it was listed: the reader reports it


def _resumes(journal_dir: Path, between: Callable[[], None] = lambda: None) -> Iterator[RunResumed]:
    """The resumes in a journal, decoding only the lines that may be one."""
    for number in segment_numbers(journal_dir):
        segment = SegmentLines(journal_dir, number)
        for line in _lines_of(segment, between=between):
            if b'"RunResumed"' in line and isinstance(event := event_of(line, segment.checked), RunResumed):
                yield event
        if isinstance(event := event_of(mended(segment.rest), segment.checked), RunResumed):
            yield event
