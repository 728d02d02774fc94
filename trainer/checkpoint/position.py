"""Where the loop stands, in all that a resumed run must know to go on there."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import torch

from events.bounds import INT_MAX
from trainer.data.rng import RngState

Phase = Literal["begin", "train", "validate", "end"]


class Position(msgspec.Struct):
    """Kept up to date by the loop's thread; copied into each checkpoint.

    ``global_step`` and ``epoch`` are those of the run's `events.origin.Origin`.
    """

    phase: Phase = "begin"
    """``begin``: the epoch has not begun. ``train``: between two of its steps. ``validate``: in a validation between
    two steps. ``end``: all its steps are done; its validation, if it has one, is not."""
    batches: int = 0
    """Micro-batches of this epoch that went into its steps so far."""
    used_up: bool = False
    """Whether the epoch's data has ended: a dataloader that was asked again would begin anew."""
    first_step: int = 0
    """``global_step`` when the epoch began."""
    elapsed_s: float = 0.0
    """How long the epoch had been under way when this attempt began with it."""
    validated_at: int = 0
    """``global_step`` of the last validation."""
    judges_epoch: bool = False
    """Whether a validation that was due in this epoch had no data, so that monitors look at the epoch's own metrics."""
    validated_keys: list[str] = []
    """Dataloaders that the validation under way is done with."""
    skipped_in_a_row: int = 0
    first_skipped: int = 0
    """The step that the first of them was to be."""
    sampler_seed: int = 0
    steps_per_epoch: int = 0
    """Optimizer steps of an epoch that ends with its data; 0 if that is unknown."""
    limits: tuple[int, int, int | None] | None = None
    """Rows of a micro-batch, micro-batches of a step, and maximum steps per epoch, by which it was computed."""
    planned_steps: int = 0
    """Optimizer steps of the epochs before this one by that number; those that were done where ``max_steps`` ended
    one."""
    data_rows: int | None = None
    """Length of the data set of this epoch, or of its dataloader; None if it has none."""
    loader_state: Any = None
    """What the dataloader's own ``state_dict`` returned, if it has one."""
    began: float = 0.0
    """``time.monotonic`` when this attempt began with the epoch; means nothing to another process."""
    batching: tuple[int, int] | None = None
    """Rows of a micro-batch, and micro-batches of a step, in this epoch."""
    generators_at_iter: list[torch.Tensor] | None = None
    """The states of the dataloader's own generators (`generators_of` in `trainer.data.loaders`) before it was iterated;
    once its data has ended, those after that."""
    keeps_workers: bool = False
    """Whether persistent workers of an earlier epoch read this one."""
    rng_at_val_loaders: RngState | None = None
    """The random generators before the dataloaders of the validation under way were made."""
    rng_at_loader: RngState | None = None
    """The random generators before the epoch's dataloader was made..."""
    rng_at_iter: RngState | None = None
    """...before it was iterated..."""
    rng_at_validation: RngState | None = None
    """...and before the dataloader that is being validated."""

    def seed_of_workers(self, epoch: int) -> int | None:
        """The seed of persistent workers that this process starts again for an epoch; None if it starts none again."""
        return (self.sampler_seed + epoch) % 2**63 if self.keeps_workers else None


SAVED_FIELDS = tuple(name for name in Position.__struct_fields__ if name not in ("began", "rng_at_validation"))
"""What of it stands in a checkpoint."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]


class SavedCallback(msgspec.Struct):
    """What a checkpoint has of a callback."""

    key: str
    kind: str | None
    state: Any


class SavedMetrics(msgspec.Struct):
    """What a checkpoint has of metrics."""

    validation: dict[str, Any]
    epoch: dict[str, Any]
    validated_at: Any
    seen: list[str]
    followed_loss: tuple[Any, Any]


class SavedState(msgspec.Struct):
    """What the state in a checkpoint must have, and of which types. What is in it is checked where it is restored."""

    global_step: _Count
    epoch: _Count
    position: Position
    rng: dict[str, Any]
    module: Any
    frozen: list[str]
    optimizers: list[dict[Any, Any]]
    schedulers: list[dict[Any, Any] | None]
    metrics: SavedMetrics
    callbacks: list[SavedCallback]
