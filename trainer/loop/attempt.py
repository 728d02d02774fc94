"""What the parts of one attempt at a run share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from events.bus.ring import Ring
from events.log import logger
from events.messages import ObserverFailed
from events.origin import Origin
from events.sink import RunInfo
from events.tracebacks import describe
from trainer.arguments import TrainerArguments
from trainer.checkpoint.resume import CheckpointPlan
from trainer.distributed.exchange import ExchangeClock
from trainer.distributed.strategy import AutomaticStrategy, ManualStrategy
from trainer.distributed.world import SINGLE, World
from trainer.hooks.hooks import CallbackHooks, HookTable, TaskName
from trainer.hooks.readback import DeviceReadback
from trainer.hooks.recorder import MetricRecorder
from trainer.loop.averaging import Averaging
from trainer.loop.control import Control
from trainer.loop.ledger import Ledger
from trainer.loop.precision import Precision
from trainer.module_interface import ModuleInterface

if TYPE_CHECKING:
    from trainer.run.record import RunRecord


@dataclasses.dataclass(eq=False)
class Attempt:
    """One attempt at a run. The session makes it; after that the thread of the loop uses it."""

    task: TaskName
    module: ModuleInterface
    arguments: TrainerArguments
    device: torch.device
    precision: Precision
    control: Control
    ring: Ring
    hooks: HookTable
    recorder: MetricRecorder
    readback: DeviceReadback
    plan: CheckpointPlan
    record: RunRecord
    info: RunInfo
    world: World = SINGLE
    """The ranks that train together."""
    strategy: AutomaticStrategy | ManualStrategy | None = None
    """Their common passes, once training has begun; None in a single process."""
    phase: str = "setup"
    """What the loop is doing, for messages."""

    def __post_init__(self) -> None:
        self.origin: Origin = self.ring.origin
        self.ledger = Ledger(self.device, self.ring.cpu_time.read_ns)
        self.exchange = ExchangeClock(self.ledger)
        self.averaging = Averaging(self.hooks.callbacks, self.fail_hook)
        self.batching = self.arguments.of_rank(self.world.data_size)
        """The arguments with the batch sizes of one rank."""
        self._noticed: set[str] = set()

    @property
    def is_at_max_steps(self) -> bool:
        """Whether ``max_steps`` ends the run here."""
        limit = self.arguments.max_steps
        return limit is not None and self.origin.global_step >= limit

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Set the phase for the length of a block.

        After an exception the phase stays: the end of the run names it.
        """
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def notice(self, text: str) -> None:
        """Log a warning once per subject, which is the text before its first colon."""
        subject = text.partition(":")[0]
        if subject not in self._noticed:
            self._noticed.add(subject)
            logger.warning(text)

    def fail_hook(self, callback: CallbackHooks, hook: str, error: Exception) -> None:
        """Report a hook that failed on the thread of the loop: end the run or disable the callback, by its policy.

        Raises:
            Exception: ``error``, if the policy is to end the run.
        """
        fatal, text = callback.delivery.on_error == "fatal", describe(error)
        action: Literal["fatal", "disabled"] = "fatal" if fatal else "disabled"
        self.ring.publish(
            ObserverFailed(*self.origin.header(), observer=callback.name, error=text, during=hook, action=action)
        )
        if fatal:
            self.control.fail(error, hook)
            raise error
        # Never retried, because its place in the step has passed.
        callback.disabled = True
        if (observer := callback.observer) is not None:
            self.ring.post(lambda: observer.disable(text))
        logger.warning(f"callback {callback.name} failed in {hook} (disabled): {text}", exc_info=error, published=True)
