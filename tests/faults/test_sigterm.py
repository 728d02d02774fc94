"""SIGTERM to a real process, at any place: it saves, leaves nothing behind, and is resumed exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from faults import resume_runs as runs
from faults.child import Outcome, run_job
from faults.injections import injected

from events.checkpoint.files import verify
from events.checkpoint.store import CheckpointStore
from events.journal.reader import JournalReader
from events.messages import CheckpointDeleted, CheckpointSaved, CheckpointUploaded, Event, RunEnded

# The place of the signal, the number of workers, and the step at which the run stops (None: it depends on the disk).
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


def terminate(folder: Path, places: list[str], workers: int) -> Outcome:
    """Train with SIGTERM at these places; in the folder ``run``, with uploads to the folder ``remote``."""
    (folder / "remote").mkdir()
    url = f"file://{folder}/remote" if "upload" in places[-1] else None
    step = 6 if "val" in places else 7
    outcome = run_job("sigterm", run_dir=folder / "run", case=uses(workers), places=places, step=step, url=url)
    assert outcome.status == 143, outcome.errors
    assert outcome.reports["at"] == places
    return outcome


def resume(folder: Path, workers: int) -> runs.Attempt:
    case = runs.Case(**uses(workers))
    last = runs.attempt(case, folder / "run", resume="auto")
    runs.assert_continues(last, folder / "run", runs.straight(case))
    return last


def journal(folder: Path) -> list[Event]:
    reader = JournalReader(folder / "run" / "journal")
    events: list[Event] = []
    while batch := reader.read():
        events += batch
    assert not reader.skipped
    return events


def announced(folder: Path) -> list[str]:
    """Names of the checkpoints that exist by the journal; each of them is complete."""
    events = journal(folder)
    deleted = {event.checkpoint for event in events if isinstance(event, CheckpointDeleted)}
    names = [event.checkpoint for event in events if isinstance(event, CheckpointSaved)]
    store = CheckpointStore(folder / "run" / "checkpoints")
    for name in store.names():
        verify(store.path(name), store.manifest(name))
    left = [name for name in names if name not in deleted]
    assert set(left) <= {str(name) for name in store.names()}
    return left


@injected("place, workers, stops_at", ONCE, 1)
def test_a_first_sigterm_saves_and_a_resumed_run_is_exact(
    place: str, workers: int, stops_at: int | None, tmp_path: Path
) -> None:
    """In a step, a validation, the first batch, a save or an upload: exit code 143, a durable checkpoint."""
    outcome = terminate(tmp_path, [place], workers)
    assert outcome.errors == ""
    [[status, reason, global_step, name]] = outcome.reports["result"]
    assert (status, reason) == ("stopped", "SIGTERM")
    assert stops_at is None or global_step == stops_at
    assert announced(tmp_path)[-1] == name
    assert name.startswith(f"step-{global_step}.a1")
    if place == "upload":
        assert name in [event.checkpoint for event in journal(tmp_path) if isinstance(event, CheckpointUploaded)]
        assert (tmp_path / "remote" / "r" / name / "manifest.json").is_file()
    resume(tmp_path, workers)


@injected("places, workers", TWICE, 0)
def test_after_a_second_sigterm_announced_checkpoints_are_complete(
    places: list[str], workers: int, tmp_path: Path
) -> None:
    """Right after the first, or during the last save or upload: exit code 143, at once, and nothing torn."""
    outcome = terminate(tmp_path, places, workers)
    assert "result" not in outcome.reports
    names = announced(tmp_path)
    ended = next(event for event in journal(tmp_path) if isinstance(event, RunEnded))
    # Where the stop was taken, only the drain was cut short.
    assert ended.status == ("stopped" if places[1].startswith("last") else "cancelled")
    last = resume(tmp_path, workers)
    start = last.net.losses[0][0] - 1 if last.net.losses else last.net.case.steps
    assert start >= (int(names[-1].partition(".")[0].removeprefix("step-")) if names else 0)
