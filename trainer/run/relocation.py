"""Changes that `launch` and ``stagecast train`` make to a trainer which a factory has built."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from trainer.checkpoint.resume import CheckpointPlan
from trainer.errors import ArgumentsError
from trainer.run.checks import check_folder, check_named
from trainer.run.record import factory_config

if TYPE_CHECKING:
    from trainer.trainer import Trainer

relocating: ContextVar[bool] = ContextVar("stagecast_relocating", default=False)
"""Set while a factory builds the trainer that `relocate` is going to place."""


def relocate(trainer: Trainer, run_id: str | None, run_dir: str | None, resume: str | None) -> None:
    """Replace the name, folder and resumed checkpoint that the factory chose by those that `launch` was given.

    Raises:
        ArgumentsError: One of them is not valid, or `resume` needs a name or a folder.
    """
    problems: list[str] = []
    check_folder(trainer._journal, run_id, run_dir, problems)
    check_named(run_id or trainer._run_id, run_dir or trainer._run_dir, resume or trainer._resume, problems)
    if problems:
        raise ArgumentsError("launch: " + "; ".join(problems))
    trainer._run_id = run_id or trainer._run_id
    trainer._run_dir = run_dir or trainer._run_dir
    trainer._resume = resume or trainer._resume


def record_launch(trainer: Trainer, arguments: Mapping[str, Any], command_line: str) -> None:
    """Record the arguments of the factory that has built the trainer, and the command line of the launching process."""
    trainer._config = factory_config(arguments) | trainer._config
    trainer._command_line = command_line


def check_resume(trainer: Trainer) -> None:
    """Check that the path from which a run would resume exists. Nothing is read or fetched.

    Raises:
        CheckpointNotFound: The path does not exist.
    """
    place = trainer._place()
    if not place.is_remote:
        store = CheckpointStore(place.run_dir / CHECKPOINTS_DIR) if place.run_dir is not None else None
        CheckpointPlan(None, store, place.resume, None, place.init_from).check()
