"""A learning rate scheduler with an interval or a metric of its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import ReduceLROnPlateau

from events.errors import ArgumentsError

Interval = Literal["step", "epoch"]


@dataclass(frozen=True)
class Schedule:
    """What `ModuleInterface.get_optimizers_schedulers` returns instead of a scheduler that needs its own settings::

        return [optimizer], [Schedule(warmup, "step"), Schedule(ReduceLROnPlateau(optimizer), monitor="val_loss")]

    Args:
        scheduler: Anything with ``step()``. Its state is part of checkpoints if it has ``state_dict`` and
            ``load_state_dict``.
        interval: Whether it steps after each optimizer step or each epoch. None: as
            ``TrainerArguments.scheduler_interval`` says.
        monitor: The metric that ``scheduler.step(value)`` gets after each validation (``train_epoch_loss``: after each
            epoch). None: a scheduler whose ``step`` needs a metric gets ``TrainerArguments.monitor``, any other gets
            none.

    Raises:
        ArgumentsError: The scheduler has no ``step()``, or one that gets a metric is to step after each step.
    """

    scheduler: Any
    interval: Interval | None = None
    monitor: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scheduler, type | Schedule) or not callable(getattr(self.scheduler, "step", None)):
            raise ArgumentsError(f"Schedule got {self.scheduler!r:.80}, which is not a scheduler; give it one")
        if self.interval not in (None, *get_args(Interval)):
            raise ArgumentsError(f"Schedule got interval={self.interval!r}; it must be 'step' or 'epoch'")
        if self.monitor is not None and (not isinstance(self.monitor, str) or not self.monitor):
            raise ArgumentsError(f"Schedule got monitor={self.monitor!r}; it must be the name of a metric")
        if self.monitor == "train_loss":
            raise ArgumentsError(
                "Schedule got monitor='train_loss', the loss of a single step; use 'train_epoch_loss', the epoch's mean"
            )
        if self.interval == "step" and self.follows_metric:
            raise ArgumentsError(
                f"{type(self.scheduler).__name__} gets a metric after each validation, not after each step; leave"
                f" interval='step' out"
            )

    @property
    def follows_metric(self) -> bool:
        """Whether the scheduler's ``step`` gets a metric."""
        return self.monitor is not None or _needs_metric(self.scheduler)


def _needs_metric(scheduler: Any) -> bool:
    if isinstance(scheduler, ReduceLROnPlateau):
        return True
    try:
        parameters = inspect.signature(scheduler.step).parameters
    except (TypeError, ValueError):
        return False
    return any(name in ("metric", "metrics") and one.default is one.empty for name, one in parameters.items())
