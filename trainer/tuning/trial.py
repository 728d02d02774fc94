"""One short training of a module, without a run folder and without a trace."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from events.errors import StagecastError
from events.log import logger
from events.messages import Event, RunStarted, TrainStepEnded, WarningLogged
from events.protocol import Stop
from events.sink import Delivery, RunInfo
from events.tracebacks import chain_of
from trainer.arguments import TrainerArguments
from trainer.errors import ArgumentsError, ContractError
from trainer.loop.control import Control
from trainer.module_interface import ModuleInterface
from trainer.run.device import resolve_device
from trainer.trainer import Trainer
from trainer.tuning.snapshot import ModuleSnapshot


class Watch:
    """The sink of a trial: passes steps on, and keeps warnings, which `Tuning.close` logs once for all trials.

    Args:
        on_step: Called on the sink's thread with each step, in order; returns whether the trial may end.
    """

    shows_warnings = True  # stderr would have them for each trial, with the end of trials that are meant to fail
    delivery = Delivery(
        types=frozenset({RunStarted, TrainStepEnded, WarningLogged}),
        overflow="block",
        on_error="fatal",
        timeout_s=None,
        runs_in="thread",
    )

    def __init__(self, control: Control, on_step: Callable[[TrainStepEnded], bool] | None) -> None:
        self.warnings: list[str] = []
        self.steps_per_epoch: int | None = None
        self._control, self._on_step = control, on_step

    def open(self, run: RunInfo) -> Watch:
        """Return itself."""
        return self

    def write(self, events: Sequence[Event]) -> None:
        """Take a batch of events."""
        for event in events:
            if isinstance(event, WarningLogged):
                self.warnings.append(event.message)
            elif isinstance(event, RunStarted):
                self.steps_per_epoch = event.steps_per_epoch
            elif isinstance(event, TrainStepEnded) and self._on_step is not None and self._on_step(event):
                self._on_step = None
                self._control.send(Stop(id="trial", reason="the trial has seen enough", checkpoint=False))

    def close(self) -> None:
        """Do nothing."""


class Tuning:
    """Trials of one module with changed arguments; `tuning` makes it.

    Raises:
        ContractError: Another run uses the module, or the process is one of several ranks.
    """

    def __init__(self, module: ModuleInterface, arguments: TrainerArguments | None) -> None:
        if not isinstance(module, ModuleInterface):
            raise ArgumentsError(f"module is a {type(module).__name__}; give an instance of a ModuleInterface")
        if module._stagecast_recorder is not None:
            raise ContractError(f"this {type(module).__name__} is being trained by a run; tune it before or after")
        ranks = torch.distributed
        if ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1:
            raise ContractError("trials train in one process; tune before the process group is initialized")
        self.module = module
        self.arguments = arguments if arguments is not None else TrainerArguments()
        self._snapshot = ModuleSnapshot(module, resolve_device(self.arguments.device))
        self._warned: dict[str, None] = {}

    def train(self, steps: int, on_step: Callable[[TrainStepEnded], bool] | None = None, **changes: Any) -> Watch:
        """Train for some optimizer steps with changed arguments, then restore everything. Raises as `Trainer.train`.

        It does not validate. The dataloader is asked again when its data has ended.
        """
        own: dict[str, Any] = {"epochs": None, "max_steps": steps, "max_train_steps_per_epoch": None}
        own |= {"val_interval_epochs": 0, "val_interval_steps": None, "validate_at_start": False}
        own |= {"batch_size_schedule": {}, "max_time_s": None, "system_interval_s": None, "strategy": "single"}
        control = Control()
        watch = Watch(control, on_step)
        try:
            arguments = msgspec.structs.replace(self.arguments, **own | changes)
            trainer = Trainer(self.module, arguments, sinks=[watch], journal=False, checkpoints=False)
            trainer._run_here("train", control)
        finally:
            self._warned |= dict.fromkeys(watch.warnings)
            self._snapshot.restore()
            free()
        return watch

    def close(self) -> None:
        """Log the warnings of all trials."""
        for message in self._warned:
            logger.warning(message)


@contextmanager
def tuning(module: ModuleInterface, arguments: TrainerArguments | None) -> Iterator[Tuning]:
    """Make trials of a module; it is then as it was before, also after an exception."""
    made = Tuning(module, arguments)
    try:
        yield made
    finally:
        made.close()


def out_of_memory(error: BaseException) -> str | None:
    """The text of a failed allocation on a device or the host, after which its memory is released; None for others."""
    found = next((one for one in chain_of(error) if _is_allocation(one)), None)
    if found is None:
        return None
    for one in chain_of(error):
        traceback.clear_frames(one.__traceback__)  # the frames of a step hold its activations
    return " ".join(str(found).split())[:300] or type(found).__name__


def _is_allocation(error: BaseException) -> bool:
    if isinstance(error, StagecastError):  # a limit of the trainer's own
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION)


_ALLOCATION = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Of torch's own RuntimeErrors."""


def free() -> None:
    """Return released memory to the device and the host."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
