"""A store of checkpoints without a run: real snapshots through the real writer, and a process that dies at a call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from events.bus.backlog import Payload
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, Metric
from events.checkpoint.settings import Checkpoints
from events.checkpoint.snapshot import Snapshot
from events.checkpoint.store import CheckpointStore
from events.messages import CheckpointDeleted, CheckpointFailed, CheckpointSaved, CheckpointStaged, Event
from events.origin import Origin
from sinks.checkpoints.writer import CheckpointWriter
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.resume import load_from
from trainer.checkpoint.slab import Slab
from trainer.checkpoint.staging import Stager
from trainer.data.tensor_state import Collected

METRIC = "val_loss"
EMPTY: dict[str, Any] = {
    "global_step": 0,
    "epoch": 0,
    "position": {},
    "rng": {},
    "module": None,
    "frozen": [],
    "optimizers": [],
    "schedulers": [],
    "metrics": {"validation": {}, "epoch": {}, "validated_at": None, "seen": [], "followed_loss": (0.0, 0)},
    "callbacks": [],
}
"""The state of a run, with nothing in it."""
URL = "file:///somewhere/r"


class Killed(BaseException):
    """The process is gone: nothing that it would still do is done."""


_CHANGING = ("mkdir", "rename", "replace", "unlink", "rmdir", "write", "pwrite", "ftruncate", "fsync", "open")


@contextlib.contextmanager
def dying(at: int | None) -> Iterator[Callable[[], int]]:
    """From the call ``at`` on (from 0), nothing that this process does to the disk happens; None: count the calls."""
    calls = 0
    originals = {name: getattr(os, name) for name in _CHANGING}

    def wrap(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if name == "open" and not args[1] & os.O_CREAT:
                return originals[name](*args, **options)
            if at is not None and calls >= at:
                raise Killed
            calls += 1
            return originals[name](*args, **options)

        return call

    for name in _CHANGING:
        setattr(os, name, wrap(name))
    try:
        yield lambda: calls
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


class Process:
    """One attempt at a run, as far as its checkpoints are concerned."""

    def __init__(self, folder: Path, settings: Checkpoints, attempt: int, parent: str | None) -> None:
        self.store = CheckpointStore(folder)
        self.attempt = attempt
        self.parent = parent
        self.events: list[Event] = []
        self._settings = settings
        self._origin = Origin("r", attempt)
        self._slab = Slab(torch.device("cpu"))
        self._stager = Stager(torch.device("cpu"))
        self.writer = CheckpointWriter(
            self.store,
            settings,
            url=URL if settings.upload is not None else None,
            origin=self._origin,
            publish=self.events.append,
            sync_journal=lambda seq: None,
            weights=lambda: None,
            module="Net",
            versions={},
        )
        self.store.prepare(AttemptNote(attempt, parent))

    def save(self, name: CheckpointName, metric: float | None) -> None:
        """Write one that holds its own name, and delete what need not be kept after it."""
        own = {"name": str(name), "x": torch.tensor([name.step, name.attempt, name.revision])}
        collected = Collected({**EMPTY, **own})
        staged = self._stager.copy(collected, self._slab, ())
        snapshot = Snapshot(
            name,
            parent=self.parent,
            metric=Metric(METRIC, metric) if metric is not None else None,
            image=staged.image,
            nbytes=staged.nbytes,
            state=collected.state,
            parts={},
            owners={},
            wait=staged.wait,
            give_back=lambda: None,
        )
        self._origin.global_step = name.step
        event = CheckpointStaged(*self._origin.header(), str(name), ["steps"])
        self.writer.deliver([(event, Payload(snapshot))])

    def of(self, kind: type[Event]) -> list[str]:
        """Names of the checkpoints that events of this type told of."""
        return [event.checkpoint for event in self.events if isinstance(event, kind)]  # type: ignore[attr-defined]

    @property
    def saved(self) -> list[str]:
        """Those that were announced."""
        return self.of(CheckpointSaved)

    @property
    def deleted(self) -> list[str]:
        return self.of(CheckpointDeleted)

    @property
    def failed(self) -> list[str]:
        return self.of(CheckpointFailed)


def load(store: CheckpointStore, rejected: list[str]) -> CheckpointName | None:
    """What "auto" resumes from; its content is that of its name."""
    loaded = load_from(store, lambda name, error: rejected.append(name))
    return None if loaded is None else named(loaded)


def named(loaded: Loaded) -> CheckpointName:
    name = loaded.manifest.name
    assert loaded.state["name"] == str(name) == loaded.folder.name
    assert loaded.state["x"].tolist() == [name.step, name.attempt, name.revision]
    return name
