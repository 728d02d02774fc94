"""Which checkpoint came from which, and which of them may go: decided on names alone, no file is touched.

**Line**: each attempt continues from one checkpoint (or from none), and so do its own. The newest checkpoint is that of
the newest attempt, else the one that this attempt started from, and so on: not the one with the most steps, if somebody
went back before it.
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
    """What an attempt started from."""

    attempt: Int64
    parent: str | None
    """A checkpoint's name; None for an attempt that began anew, or elsewhere."""
    source: str | None = None
    """The path of the checkpoint of another run that it began with."""
    id: str = ""
    """Drawn at random: tells it from the same attempt at another run of that name."""


class _SignedAttempt(msgspec.Struct, forbid_unknown_fields=True):
    attempt: msgspec.Raw
    xxh3_128: str


def attempt_name(attempt: int) -> str:
    """Name of the file that says what an attempt started from."""
    return f"attempt-{attempt}.json"


def is_attempt_name(text: str) -> bool:
    """Whether a file of this name may be one of those."""
    return text.startswith("attempt-") and text.endswith(".json")


def encode_attempt(attempt: AttemptNote) -> bytes:
    """The bytes of such a file: what it says, and a hash of that, as in a manifest."""
    return _sign(msgspec.json.encode(attempt))


def decode_attempt(file_name: str, data: bytes) -> AttemptNote | None:
    """Read such a file; None if it is damaged: the checkpoints' manifests say it too."""
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
    """The checkpoints that a run as it stands has come from, the newest first.

    Args:
        names: All that there are, in the order in which they came about.
        attempts: What each attempt started from, as far as it was noted.
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
        # Only ever back, whatever damaged files say.
        current = upto.attempt if upto is not None and upto.attempt < current else 0
    return line


def _first_parent(own: list[CheckpointName], parent_of: Callable[[CheckpointName], str | None]) -> str | None:
    """What an attempt of which we have only checkpoints started from, as its oldest one that can be read says."""
    for name in own:
        with contextlib.suppress(CheckpointDamaged, CheckpointNotFound, CheckpointTooNew, OSError):
            return parent_of(name)
    return None


def candidates_of(line: list[CheckpointName], names: Iterable[CheckpointName]) -> Iterator[CheckpointName]:
    """What to try to resume from, best first; see `CheckpointStore.candidates`."""
    yield from line
    if line:
        known = set(line)
        yield from reversed([name for name in names if name not in known])


def by_age(line: Iterable[CheckpointName], names: Iterable[CheckpointName]) -> list[CheckpointName]:
    """All checkpoints, the first to go first: those that the run did not come from, then its line, from the oldest."""
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
    """The metric of each checkpoint of a line that has one, in its order.

    Args:
        line: The newest first.
        read: Reads a manifest, or raises as `CheckpointStore.manifest` does.
        metric: Only those of this metric; None: of the one that the newest of them has.
        on_unread: Called with the name of each whose manifest cannot be read, and why.
        run_id: Only those of this run; None: of any.
    """
    scores: dict[CheckpointName, Metric] = {}
    for name in line:
        try:
            manifest = read(name)
        except CheckpointNotFound:
            continue  # deleted meanwhile
        except CheckpointError as error:
            on_unread(str(name), error)
            continue
        found = manifest.metric if run_id in (None, manifest.run_id) else None
        if found is not None and found.name == (metric or found.name):
            metric = found.name
            scores[name] = found
    return scores


def ranked(scores: Mapping[CheckpointName, Metric], mode: str | None = None) -> list[CheckpointName]:
    """Checkpoints by their metric, the best first.

    Args:
        scores: See `scores_of`.
        mode: ``"min"`` or ``"max"``; None: as the newest of them was taken.
    """
    mode = mode or next((score.mode for score in scores.values()), "min")
    return best_first(scores, {name: score.value for name, score in scores.items()}, mode == "max")


def best_first(
    names: Iterable[CheckpointName], metrics: Mapping[CheckpointName, float], largest_is_best: bool
) -> list[CheckpointName]:
    """Checkpoints by their metric, the best first; of equal ones the newer first."""
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
    """Decide which checkpoints may go, the oldest first.

    Those that the run did not come from go first: somebody went back before them.

    Args:
        line: What the run has come from, the newest first (`CheckpointStore.line`).
        names: All that there are.
        metrics: The monitored metric, of those that have a finite one.
        keep_last: How many of the newest stay, at least one; None: all stay.
        keep_best: How many of the line with the best metric stay, too; of two equal ones the newer. Several at one step
            count once: the newest stays.
        uploaded: Those that are in the remote store; None if uploads are off. One goes only when a newer one is there.
    """
    if keep_last is None:
        return []
    line = list(line)
    ordered = by_age(line, names)
    kept = set(ordered[-max(1, keep_last) :])
    # The newest of each step: several at one step of the line hold the same weights, and count once.
    scored = {name.step: name for name in reversed(line) if name in metrics}
    kept.update(best_first(scored.values(), metrics, largest_is_best)[:keep_best])
    if uploaded is not None:
        there = set(uploaded)
        newest = next((index for index in range(len(ordered) - 1, -1, -1) if ordered[index] in there), 0)
        kept.update(ordered[newest:])
    return [name for name in ordered if name not in kept]
