"""The ancestry of checkpoints, and the choice of those to delete. Works on names, without files.

**Line**: the checkpoints of the newest attempt, then those that it started from up to its parent, and so on. So the
newest checkpoint of the line is not the one with the most steps if the user resumed from an older one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
import xxhash

from events.bounds import LAST_ATTEMPT, Int64
from events.checkpoint.manifest import CheckpointName, Manifest, Metric
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


class _SignedAttempt(msgspec.Struct, forbid_unknown_fields=True):
    attempt: msgspec.Raw
    xxh3_128: str


def attempt_name(attempt: int) -> str:
    """Return the file name of an attempt's note."""
    return f"attempt-{attempt}.json"


def is_attempt_name(text: str) -> bool:
    """Whether a file name may be that of a note."""
    return text.startswith("attempt-") and text.endswith(".json")


def encode_attempt(attempt: AttemptNote) -> bytes:
    """Return the bytes of a note, with a hash as in a manifest."""
    return _sign(msgspec.json.encode(attempt))


def decode_attempt(file_name: str, data: bytes) -> AttemptNote | None:
    """Read a note; None if it is damaged: manifests hold the parent too."""
    try:
        body = bytes(msgspec.json.decode(data, type=_SignedAttempt).attempt)
        attempt = msgspec.json.decode(body, type=AttemptNote)
    except (ValueError, RecursionError):
        return None
    known = _sign(body) == data and 1 <= attempt.attempt <= LAST_ATTEMPT
    return attempt if known and attempt_name(attempt.attempt) == file_name else None


def _sign(body: bytes) -> bytes:
    return msgspec.json.encode(_SignedAttempt(msgspec.Raw(body), xxhash.xxh3_128_hexdigest(body))) + b"\n"


def line_of(
    names: Iterable[CheckpointName],
    attempts: Mapping[int, AttemptNote],
    parent_of: Callable[[CheckpointName], str | None],
) -> list[CheckpointName]:
    """Return the line of the newest attempt, the newest checkpoint first.

    Args:
        names: All checkpoints, the oldest first.
        attempts: The readable notes of attempts.
        parent_of: Reads the parent from a checkpoint's manifest, or raises as `CheckpointStore.manifest` does.
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


def candidates_of(line: list[CheckpointName], names: Iterable[CheckpointName]) -> Iterator[CheckpointName]:
    """Yield the checkpoints to try to resume from; see `CheckpointStore.candidates`."""
    yield from line
    if line:
        known = set(line)
        yield from reversed([name for name in names if name not in known])


def by_age(line: Iterable[CheckpointName], names: Iterable[CheckpointName]) -> list[CheckpointName]:
    """Return all checkpoints in the order of deletion: those outside the line, then the line from the oldest."""
    line = list(line)
    known = set(line)
    return [*(name for name in sorted(names) if name not in known), *reversed(line)]


def scores_of(
    line: Iterable[CheckpointName],
    read: Callable[[CheckpointName], Manifest],
    metric: str | None = None,
    on_unread: Callable[[str, Exception], None] = lambda name, error: None,
    run_id: str | None = None,
) -> dict[CheckpointName, Metric]:
    """Return the metrics of a line's checkpoints, in its order.

    Args:
        line: The newest first.
        read: Reads a manifest, or raises as `CheckpointStore.manifest` does.
        metric: Name of the metric; None for that of the newest checkpoint with one.
        on_unread: Called with name and error of each unreadable manifest.
        run_id: Only checkpoints of this run; None for any.
    """
    scores: dict[CheckpointName, Metric] = {}
    for name in line:
        try:
            manifest = read(name)
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


def ranked(scores: Mapping[CheckpointName, Metric], mode: str | None = None) -> list[CheckpointName]:
    """Return checkpoints by metric, the best first.

    Args:
        scores: See `scores_of`.
        mode: ``"min"`` or ``"max"``; None for that of the newest checkpoint.
    """
    mode = mode or next((score.mode for score in scores.values()), "min")
    return best_first(scores, {name: score.value for name, score in scores.items()}, mode == "max")


def best_first(
    names: Iterable[CheckpointName], metrics: Mapping[CheckpointName, float], largest_is_best: bool
) -> list[CheckpointName]:
    """Return checkpoints by metric, the best first; of equal ones, the newer first."""
    sign = 1 if largest_is_best else -1
    return sorted(names, key=lambda name: (sign * metrics[name], name), reverse=True)


def expendable(
    line: Iterable[CheckpointName],
    names: Iterable[CheckpointName],
    metrics: dict[CheckpointName, float],
    *,
    keep_last: int | None,
    keep_best: int,
    largest_is_best: bool,
    uploaded: Iterable[CheckpointName] | None,
) -> list[CheckpointName]:
    """Return the checkpoints to delete, in the order of `by_age`.

    Args:
        line: The newest first (`CheckpointStore.line`).
        names: All checkpoints.
        metrics: The monitored metric, where it is finite.
        keep_last: Number of the newest checkpoints to keep, at least one; None keeps all.
        keep_best: Number of the line's best checkpoints to keep; of equal ones, the newer. Several at one step count
            once, and the newest is kept.
        uploaded: Uploaded checkpoints; None without uploads. A checkpoint is kept until a newer one is uploaded.
    """
    if keep_last is None:
        return []
    line = list(line)
    ordered = by_age(line, names)
    kept = set(ordered[-max(1, keep_last) :])
    # The newest of each step: several at one step hold the same weights, and count once.
    scored = {name.step: name for name in reversed(line) if name in metrics}
    kept.update(best_first(scored.values(), metrics, largest_is_best)[:keep_best])
    if uploaded is not None:
        there = set(uploaded)
        newest = next((index for index in range(len(ordered) - 1, -1, -1) if ordered[index] in there), 0)
        kept.update(ordered[newest:])
    return [name for name in ordered if name not in kept]
