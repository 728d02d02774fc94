"""SIGTERM to a real process, at any place: it saves, leaves nothing behind, and is gone on from exactly.

The processes are forked from one that has imported everything, and end as any program does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint.files import verify
from events.checkpoint.store import CheckpointStore
from events.journal.reader import JournalReader
from events.messages import CheckpointDeleted, CheckpointSaved, CheckpointUploaded, Event, RunEnded

INJECTIONS = {
    "test_a_first_sigterm_saves_and_a_resumed_run_goes_on_exactly": (1, 10),
    "test_after_a_second_sigterm_what_was_announced_is_whole": (0, 9),
}
# Where the signal comes, with how many workers, and at which step the run stops (None: it depends on the disk).
ONCE: list[tuple[str, int, int | None]] = [
    ("save", 2, None),
    ("train", 0, 7),
    ("train", 2, 7),
    ("val", 0, 6),
    ("val", 2, 6),
    ("first batch", 0, 1),
    ("first batch", 2, None),
    ("save", 0, None),
    ("upload", 0, None),
    ("upload", 2, None),
]
TWICE: list[tuple[list[str], int]] = [
    (["train", "last save"], 0),
    (["train", "train"], 0),
    (["train", "train"], 2),
    (["val", "last save"], 2),
    (["val", "val"], 0),
    (["save", "save"], 0),
    (["save", "last save"], 2),
    (["first batch", "last save"], 2),
    (["upload", "last upload"], 0),
]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def uses(workers: int) -> dict[str, Any]:
    return {"workers": workers, "augment": True, "resume_data": "replay", "scheduler": "plateau"}


def journal(run_dir: Path) -> list[Event]:
    reader = JournalReader(run_dir / "journal")
    events: list[Event] = []
    while batch := reader.read():
        events += batch
    assert not reader.skipped
    return events


def announced(run_dir: Path) -> list[str]:
    """Names of the checkpoints that the journal says are there; each of them is whole."""
    events = journal(run_dir)
    gone = {event.checkpoint for event in events if isinstance(event, CheckpointDeleted)}
    names = [event.checkpoint for event in events if isinstance(event, CheckpointSaved)]
    store = CheckpointStore(run_dir / "checkpoints")
    for name in store.names():
        verify(store.path(name), store.manifest(name))
    there = [name for name in names if name not in gone]
    assert set(there) <= {str(name) for name in store.names()}
    return there


def test_a_first_sigterm_saves_and_a_resumed_run_goes_on_exactly(
    runs: Any, child: Any, tmp_path: Path, injection: int
) -> None:
    """In a step, a validation, the first batch, a save or an upload: exit code 143, durable, no workers."""
    place, workers, stops_at = ONCE[injection]
    run_dir = tmp_path / "run"
    url = f"file://{tmp_path}/remote" if place == "upload" else None
    if url is not None:
        os.mkdir(tmp_path / "remote")
    step = 6 if place == "val" else 7
    said, status, errors = child("sigterm", run_dir=run_dir, case=uses(workers), places=[place], step=step, url=url)
    assert status == 143, errors
    assert errors == ""
    assert said["at"] == [place]
    ((ended, reason, global_step, name),) = said["result"]
    assert (ended, reason) == ("stopped", "SIGTERM")
    assert stops_at is None or global_step == stops_at
    assert announced(run_dir)[-1] == name
    assert name.startswith(f"step-{global_step}.a1")
    if url is not None:
        assert name in [event.checkpoint for event in journal(run_dir) if isinstance(event, CheckpointUploaded)]
        assert (tmp_path / "remote" / "r" / name / "manifest.json").is_file()
    case = runs.Case(**uses(workers))
    last = runs.attempt(case, run_dir, resume="auto")
    runs.assert_continues(last, run_dir, runs.straight(case))


def test_after_a_second_sigterm_what_was_announced_is_whole(
    runs: Any, child: Any, tmp_path: Path, injection: int
) -> None:
    """Right after the first, or while the last save or upload goes on: exit code 143, at once, and nothing torn."""
    places, workers = TWICE[injection]
    run_dir = tmp_path / "run"
    url = f"file://{tmp_path}/remote" if "last upload" in places else None
    if url is not None:
        os.mkdir(tmp_path / "remote")
    step = 6 if "val" in places else 7
    said, status, errors = child("sigterm", run_dir=run_dir, case=uses(workers), places=places, step=step, url=url)
    assert status == 143, errors
    assert said["at"] == places
    assert "result" not in said
    names = announced(run_dir)
    ended = next(event for event in journal(run_dir) if isinstance(event, RunEnded))
    if places[1].startswith("last"):  # the stop was taken: it is only the drain that was cut short
        assert ended.status == "stopped"
    else:
        assert ended.status == "cancelled"
    case = runs.Case(**uses(workers))
    last = runs.attempt(case, run_dir, resume="auto")
    begin = last.net.losses[0][0] - 1 if last.net.losses else case.steps
    assert begin >= (int(names[-1].partition(".")[0].removeprefix("step-")) if names else 0)
    runs.assert_continues(last, run_dir, runs.straight(case))
