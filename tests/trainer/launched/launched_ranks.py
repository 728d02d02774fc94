"""Factories of trainers for `test_launch_ranks`, called in the process of each rank."""

from __future__ import annotations

import os
from typing import Any

from launched_jobs import Job

from events.log import logger
from trainer import Checkpoints, Trainer, TrainerArguments


class RankJob(Job):
    """A module whose deed one rank does alone."""

    def warn(self) -> None:
        logger.warning("a word of warning")

    def kill(self) -> None:
        print("about to be killed")
        os.kill(os.getpid(), 9)


def build(
    rank: int = 0,
    deed: str = "",
    strategy: Any = "auto",
    epochs: int = 2,
    step_s: float = 0.0,
    at: int = 5,
    every_steps: int | None = None,
) -> Trainer:
    """Build a trainer for epochs of two steps."""
    own = int(os.environ["RANK"])
    if deed == "refuse" and own == rank:
        raise ValueError(f"not on rank {own}")
    print(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    arguments = TrainerArguments(
        epochs=epochs, train_batch_size=8, device="cpu", strategy=strategy, seed=0, stop_grace_s=20.0
    )
    module = RankJob(deed=deed if own == rank else "", step_s=step_s, at=at)
    return Trainer(module, arguments, checkpoints=Checkpoints(every_steps=every_steps))
