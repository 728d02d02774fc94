"""Runs in one folder, one attempt after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.training import Net, Outcome, make_trainer, train

from events.checkpoint.store import CheckpointStore
from events.journal.history import read_history
from events.messages import CheckpointSaved, TrainStepEnded
from trainer import Checkpoints, ModuleInterface, Trainer


class RunFolder:
    """A run folder; its runs take only the checkpoints that the test asks for, and skip none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = CheckpointStore(path / "checkpoints")

    def train(self, module: ModuleInterface | None = None, **options: Any) -> Outcome:
        """Train; ``options`` are those of `support.training.train` and of `Checkpoints`."""
        return train(module or Net(), **self._own(options))

    def trainer(self, module: ModuleInterface | None = None, **options: Any) -> Trainer:
        return make_trainer(module or Net(), **self._own(options))

    def _own(self, options: dict[str, Any]) -> dict[str, Any]:
        fields = {name: options.pop(name) for name in Checkpoints.__struct_fields__ if name in options}
        settings = Checkpoints(**{"every_minutes": None, "at_end": False, "when_busy": "wait"} | fields)
        return {"run_dir": self.path, "run_id": "r", "checkpoints": settings} | options

    @property
    def names(self) -> list[str]:
        """The checkpoints, the oldest first."""
        return [str(name) for name in self.store.names()]

    @property
    def line(self) -> list[str]:
        return [str(name) for name in self.store.line()]

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Step and attempt of the history in the journal."""
        history = read_history(self.path / "journal")
        return [(event.global_step, event.attempt) for event in history if type(event) is TrainStepEnded]

    def folder(self, name: str) -> Path:
        return self.store.folder / name


def saved(outcome: Outcome) -> list[str]:
    """Names of the saved checkpoints, in order."""
    return [event.checkpoint for event in outcome.of(CheckpointSaved)]
