"""The ancestry of checkpoints, and the choice of those to delete. Works without files.

**Line**: the checkpoints of the newest attempt, then those that it started from up to its parent, and so on. So the
newest checkpoint of the line is not the one with the most steps if the user resumed from an older one.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Container, Iterable, Mapping

import msgspec

from events.bounds import LAST_ATTEMPT, Int64
from events.checkpoint.manifest import CheckpointName, Manifest, Metric, sign, signed_in
from events.checkpoint.settings import Checkpoints
from events.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound, CheckpointTooNew


class AttemptNote(msgspec.Struct, frozen=True):
    """The start of an attempt."""

    attempt: Int64
    parent: str | None
    """Name of a checkpoint; None for a new run, or a start from another run's checkpoint."""
    source: str | None = None
    """Path of another run's checkpoint that it started from."""
    id: str = ""
    """Random: distinguishes it from the same attempt of another run with that name."""


def attempt_name(attempt: int) -> str:
    """Return the file name of an attempt's note."""
    return f"attempt-{attempt}.json"


def is_attempt_name(text: str) -> bool:
    """Whether a file name may be that of a note."""
    return text.startswith("attempt-") and text.endswith(".json")


def encode_attempt(attempt: AttemptNote) -> bytes:
    """Return the bytes of a note, with a hash as in a manifest."""
    return sign("attempt", attempt)


def decode_attempt(file_name: str, data: bytes) -> AttemptNote | None:
    """Read a note; None if it is damaged: manifests hold the parent too."""
    try:
        attempt = msgspec.json.decode(signed_in("attempt", data), type=AttemptNote)
    except (ValueError, RecursionError):
        return None
    known = 1 <= attempt.attempt <= LAST_ATTEMPT and attempt_name(attempt.attempt) == file_name
    return attempt if known else None


class Lineage(abc.ABC):
    """Checkpoints of one run, found by their ancestry. Every method waits for the disk or the network."""

    @abc.abstractmethod
    def names(self) -> list[CheckpointName]:
        """Return all complete checkpoints, the oldest first."""

    @abc.abstractmethod
    def attempts(self) -> dict[int, AttemptNote]:
        """Return the readable notes of attempts."""

    @abc.abstractmethod
    def manifest(self, name: CheckpointName) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointNotFound: The checkpoint does not exist.
            CheckpointDamaged: The manifest is missing or changed.
            CheckpointTooNew: A later version wrote it.
        """

    def line(self) -> list[CheckpointName]:
        """Return the line of the newest attempt, the newest checkpoint first."""
        return line_of(self.names(), self.attempts(), lambda name: self.manifest(name).parent)

    def candidates(self) -> list[CheckpointName]:
        """Return the checkpoints to try to resume from: the line, then all others in case the line is damaged.

        None if the newest attempt started a new run and has no checkpoint yet.
        """
        line = self.line()
        known = set(line)
        return [*line, *(name for name in reversed(self.names()) if name not in known)] if line else []

    def scores(
        self,
        metric: str | None = None,
        on_unread: Callable[[str, Exception], None] = lambda name, error: None,
        run_id: str | None = None,
    ) -> dict[CheckpointName, Metric]:
        """Return the metrics of the line's checkpoints, the newest first.

        Args:
            metric: Name of the metric; None for that of the newest checkpoint with one.
            on_unread: Called with name and error of each unreadable manifest.
            run_id: Only checkpoints of this run; None for any.
        """
        scores: dict[CheckpointName, Metric] = {}
        for name in self.line():
            try:
                manifest = self.manifest(name)
            except CheckpointNotFound:
                continue  # deleted
            except CheckpointError as error:
                on_unread(str(name), error)
                continue
            found = manifest.metric if run_id in (None, manifest.run_id) else None
            if found is not None and found.name == (metric or found.name):
                metric = found.name
                scores[name] = found
        return scores

    def expendable(
        self, settings: Checkpoints, run_id: str, uploaded: Container[CheckpointName] | None = None
    ) -> dict[CheckpointName, Manifest | None]:
        """Return the checkpoints that retention deletes, in order, each with its manifest if that is readable.

        Checkpoints of other runs do not count and are not deleted; nor is one whose manifest the disk cannot read now.

        Args:
            settings, uploaded: See `expendable`.
        """
        manifests: dict[CheckpointName, Manifest] = {}
        others: set[CheckpointName] = set()
        unread: set[CheckpointName] = set()
        names = self.names() if settings.keep_last is not None else []
        for name in names:
            try:
                manifests[name] = manifest = self.manifest(name)
            except (CheckpointDamaged, CheckpointNotFound, CheckpointTooNew) as error:
                if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                    unread.add(name)
            else:
                if manifest.run_id != run_id:
                    others.add(name)
        scores = {name: one.metric for name, one in manifests.items() if one.metric is not None}
        metrics = {name: score.value for name, score in scores.items() if score.name == settings.best}
        line, own = ([name for name in some if name not in others] for some in (self.line(), names))
        going = expendable(settings, line, own, metrics, uploaded)
        return {name: manifests.get(name) for name in going if name not in unread}


def line_of(
    names: Iterable[CheckpointName],
    attempts: Mapping[int, AttemptNote],
    parent_of: Callable[[CheckpointName], str | None],
) -> list[CheckpointName]:
    """Return the line of the newest attempt, the newest checkpoint first.

    Args:
        names: All checkpoints, the oldest first.
        attempts: The readable notes of attempts.
        parent_of: Reads the parent from a checkpoint's manifest, or raises as `Lineage.manifest` does.
    """
    of_attempt: dict[int, list[CheckpointName]] = {}
    for name in names:
        of_attempt.setdefault(name.attempt, []).append(name)
    current = max([*attempts, *of_attempt], default=0)
    line: list[CheckpointName] = []
    upto: CheckpointName | None = None
    while current > 0:
        own = [name for name in of_attempt.get(current, ()) if upto is None or not upto < name]
        line += reversed(own)
        parent = attempts[current].parent if current in attempts else _first_parent(own, parent_of)
        upto = CheckpointName.parse(parent) if parent is not None else None
        # Only back, even if damaged files name a later attempt.
        current = upto.attempt if upto is not None and upto.attempt < current else 0
    return line


def _first_parent(own: list[CheckpointName], parent_of: Callable[[CheckpointName], str | None]) -> str | None:
    """Return the parent of an attempt without a note, from its oldest readable manifest."""
    for name in own:
        with contextlib.suppress(CheckpointDamaged, CheckpointNotFound, CheckpointTooNew, OSError):
            return parent_of(name)
    return None


def by_age(line: Iterable[CheckpointName], names: Iterable[CheckpointName]) -> list[CheckpointName]:
    """Return all checkpoints in the order of deletion: those outside the line, then the line from the oldest."""
    line = list(line)
    known = set(line)
    return [*(name for name in sorted(names) if name not in known), *reversed(line)]


def ranked(scores: Mapping[CheckpointName, Metric], mode: str | None = None) -> list[CheckpointName]:
    """Return checkpoints by metric, the best first.

    Args:
        scores: See `Lineage.scores`.
        mode: ``"min"`` or ``"max"``; None for that of the newest checkpoint.
    """
    mode = mode or next((score.mode for score in scores.values()), "min")
    return _best_first({name: score.value for name, score in scores.items()}, mode)


def _best_first(metrics: Mapping[CheckpointName, float], mode: str) -> list[CheckpointName]:
    sign = 1 if mode == "max" else -1
    return sorted(metrics, key=lambda name: (sign * metrics[name], name), reverse=True)  # of equal ones, the newer


def expendable(
    settings: Checkpoints,
    line: Iterable[CheckpointName],
    names: Iterable[CheckpointName],
    metrics: Mapping[CheckpointName, float],
    uploaded: Container[CheckpointName] | None,
) -> list[CheckpointName]:
    """Return the checkpoints that retention deletes, in the order of `by_age`.

    Args:
        settings: How many of the newest and of the line's best are kept. Several at one step count once among the best,
            and the newest is kept.
        line: The newest first (`Lineage.line`).
        names: All checkpoints.
        metrics: The monitored metric, where it is finite.
        uploaded: Uploaded checkpoints; None without uploads. A checkpoint is kept until a newer one is uploaded.
    """
    if settings.keep_last is None:
        return []
    line = list(line)
    ordered = by_age(line, names)
    kept = set(ordered[-settings.keep_last :])
    scored = {name.step: name for name in reversed(line) if name in metrics}
    kept.update(
        _best_first({name: metrics[name] for name in scored.values()}, settings.best_mode)[: settings.keep_best]
    )
    if uploaded is not None:
        there = [index for index, name in enumerate(ordered) if name in uploaded]
        kept.update(ordered[max(there, default=0) :])
    return [name for name in ordered if name not in kept]
