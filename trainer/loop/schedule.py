"""Learning rate schedulers: when each steps, and on which metric."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import ReduceLROnPlateau

from events.errors import ArgumentsError
from events.log import logger
from events.metrics import TRAIN_EPOCH_LOSS
from trainer.errors import add_note
from trainer.loop.attempt import Attempt

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


def _step(schedulers: list[Any]) -> None:
    scheduler: Any = None
    try:
        for scheduler in schedulers:
            scheduler.step()
    except (LookupError, ValueError) as error:
        known, groups = (
            getattr(scheduler, "base_lrs", None),
            getattr(getattr(scheduler, "optimizer", None), "param_groups", ()),
        )
        if isinstance(known, list) and len(known) < len(groups):
            add_note(
                error,
                f"{type(scheduler).__name__} was built for {len(known)} parameter groups, and its optimizer has"
                f" {len(groups)} now; build it with all groups, or use a scheduler such as StepLR",
            )
        raise


class Schedules:
    """The schedulers of a run. Used on the loop's thread.

    Attributes:
        per_step: Those that step after each optimizer step.
    """

    def __init__(self, schedules: Iterable[Schedule], attempt: Attempt) -> None:
        schedules = list(schedules)
        self.schedulers = [one.scheduler for one in schedules]
        self._attempt = attempt
        arguments = attempt.arguments
        self._plateau = [(one.scheduler, one.monitor or arguments.monitor) for one in schedules if one.follows_metric]
        timed: dict[str, list[Any]] = {"step": [], "epoch": []}
        for one in schedules:
            if not one.follows_metric:
                timed[one.interval or arguments.scheduler_interval].append(one.scheduler)
        self.per_step, self._per_epoch = timed["step"], timed["epoch"]

    @property
    def follows_epoch_loss(self) -> bool:
        """Whether a scheduler follows ``train_epoch_loss``."""
        return any(monitor == TRAIN_EPOCH_LOSS for _, monitor in self._plateau)

    def replace(self, schedulers: list[Any], per_step: bool) -> None:
        """Step these from now on instead of the module's; `state` remains that of the module's."""
        self._plateau = []
        self.per_step, self._per_epoch = (schedulers, []) if per_step else ([], schedulers)

    def after_step(self) -> None:
        """The optimizers have stepped: schedulers of steps do."""
        _step(self.per_step)

    def after_epoch(self) -> None:
        """A training epoch has ended: schedulers of epochs step."""
        _step(self._per_epoch)

    def follow(self, *, epoch_loss: bool | None) -> None:
        """Give their metric to the schedulers that follow one, if it exists.

        Args:
            epoch_loss: Only those that follow ``train_epoch_loss``; False: only the others. None: all.

        Raises:
            MetricNotFound: The first validation has not produced it.
        """
        for scheduler, monitor in self._plateau:
            if epoch_loss is None or epoch_loss == (monitor == TRAIN_EPOCH_LOSS):
                value = self._attempt.recorder.monitored(monitor, type(scheduler).__name__, required=True)
                if value is not None:
                    with self._attempt.ledger.within("readback"):
                        number = float(value)  # SYNC: once per validation or epoch, for a scheduler that needs it
                    scheduler.step(number)

    def state(self) -> list[dict[str, Any] | None]:
        """The state of each scheduler, as it keeps it, not copied; None for one without ``state_dict``."""
        # Functions in it (of SWALR) are those that the constructor has set.
        return [
            {name: value for name, value in scheduler.state_dict().items() if not callable(value)}
            if hasattr(scheduler, "state_dict")
            else None
            for scheduler in self.schedulers
        ]

    def load_state(self, states: list[dict[str, Any] | None], where: str) -> None:
        """Restore what `state` returned.

        Args:
            where: The checkpoint that it comes from, for messages.
        """
        for scheduler, saved in zip(self.schedulers, states, strict=True):
            if saved is not None and hasattr(scheduler, "load_state_dict"):
                scheduler.load_state_dict(saved)
            else:
                logger.warning(
                    f"{where} has no state of the scheduler {type(scheduler).__name__}, which starts over; give it"
                    f" state_dict and load_state_dict"
                )
