"""Errors of the trainer: arguments that cannot work, and modules that break the contract.

StagecastError                    (events.errors)
├── ArgumentsError                (events.errors)
├── ContractError                 the user's module does not keep the contract
│   ├── DataLoaderError           no dataloader, or not one, came back; also a TypeError
│   │   └── EmptyDataLoader       a dataloader yielded no batch
│   ├── StepOutputError           a step returned no loss tensor, or nothing that can be kept; also a TypeError
│   ├── BatchWeightError          batch_weight returned something that is not a weight; also a ValueError
│   ├── OptimizerError            get_optimizers_schedulers returned something else; also a TypeError
│   ├── SignatureError            a hook does not take the outputs of the step; also a TypeError
│   └── MetricNotFound            the monitored metric was never logged; also a LookupError
├── NonFiniteError                NaN or infinity ended the run; also an ArithmeticError
│   ├── NonFiniteLossError        it was the loss
│   └── NonFiniteGradientError    it was a gradient; the loss was finite
├── EpochOutputsTooLarge          outputs kept for the end of an epoch exceed their limit; also a MemoryError
├── PrecisionError                this torch cannot do the requested precision
├── LaunchedRunFailed             what a launched run raised in its own process: type, text and traceback
├── LaunchedRunCrashed            the process of a launched run died before it reported how the run ended
└── ConnectError                  a run cannot be watched over the network
    ├── ProtocolViolated          the server sent an answer that no server of runs sends
    ├── ConnectionLost            the server has been out of reach for too long, or the block of `connect` was left
    ├── CommandRefused            the server did not take a command
    └── ConnectedRunFailed        the run failed where it runs
        └── ConnectedRunLost      its process died before it reported how the run ended

KeyboardInterrupt
└── RunInterrupted                Ctrl-C (SIGINT) stopped the run of `Trainer.train` or `Trainer.test` orderly
SystemExit
└── RunTerminated                 SIGTERM did

Whatever the user's own code raises comes out as itself, never wrapped in one of these; where it was raised in another
process, it is told of by `LaunchedRunFailed`, because an exception cannot be carried over as itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from events.errors import ArgumentsError as ArgumentsError
from events.errors import StagecastError
from events.messages import Event
from events.process import signal_name
from events.protocol import RunResult

REMEDY = "lower the learning rate, set clip_grads, or choose non_finite='skip'"
"""What helps against NaN, for messages."""


class ContractError(StagecastError):
    """The user's module does not keep the contract: names the method and what it returned."""


class DataLoaderError(ContractError, TypeError):
    """A method that returns dataloaders returned something else."""


class EmptyDataLoader(DataLoaderError):
    """A dataloader yielded no batch, so there is nothing to train or evaluate."""


class StepOutputError(ContractError, TypeError):
    """A step did not return what the contract says: a loss tensor first, then any further outputs."""


class BatchWeightError(ContractError, ValueError):
    """`ModuleInterface.batch_weight` returned something that is not a weight, or only zeros for a whole step."""


class OptimizerError(ContractError, TypeError):
    """`get_optimizers_schedulers` did not return optimizers and schedulers."""


class SignatureError(ContractError, TypeError):
    """A hook takes another number of outputs than the step returned."""


class MetricNotFound(ContractError, LookupError):
    """The metric that a scheduler waits for was neither logged nor computed; names those that were."""


class NonFiniteError(StagecastError, ArithmeticError):
    """NaN or infinity ended the run: ``non_finite="stop"``, or too many skipped steps in a row."""


class NonFiniteLossError(NonFiniteError):
    """The loss was NaN or infinite."""


class NonFiniteGradientError(NonFiniteError):
    """A gradient was NaN or infinite while the loss was finite."""


class EpochOutputsTooLarge(StagecastError, MemoryError):
    """The outputs kept for the end of an epoch exceed their limit; names the hook and the ways out."""


class PrecisionError(StagecastError):
    """The requested precision needs something that this version of torch does not have."""


class LaunchedRunFailed(StagecastError):
    """A launched run, or the factory of its trainer, raised an exception in its own process."""

    def __init__(self, message: str, *, type_name: str = "", text: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        """The exception's type: ``ValueError``, ``my_package.errors.Diverged``."""
        self.text = text
        self.traceback = traceback
        """As Python prints it, with the exceptions that led to it."""


class LaunchedRunCrashed(StagecastError):
    """The process of a launched run died, and the run did not end: a crash, the out-of-memory killer, `os._exit`."""

    def __init__(
        self,
        message: str,
        *,
        returncode: int | None = None,
        last_events: Sequence[Event] = (),
        log_tail: str = "",
    ) -> None:
        super().__init__(message)
        self.returncode = returncode
        """The exit code; minus the number of the signal that killed it; None if it was lost."""
        self.last_events = list(last_events)
        """The end of its journal."""
        self.log_tail = log_tail
        """The end of what it printed."""

    @property
    def signal(self) -> str | None:
        """The name of the signal that ended it, such as ``SIGKILL``; None if it ended by itself."""
        return signal_name(self.returncode)


class ConnectError(StagecastError):
    """A run cannot be watched over the network; the message names the server and a fix."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """Of the server's answer; None if there was none."""


class ProtocolViolated(ConnectError):
    """The server sent an answer that no server of runs sends: too large, encoded, of other types or out of order."""


class ConnectionLost(ConnectError):
    """The server has been out of reach for longer than ``give_up_s``, or the block of `connect` has been left."""


class CommandRefused(ConnectError):
    """The server did not take a command."""


class ConnectedRunFailed(ConnectError):
    """The run failed where it runs."""

    def __init__(self, message: str, result: RunResult | None = None) -> None:
        super().__init__(message)
        self.result = result
        """How the run ended, as far as it is known."""


class ConnectedRunLost(ConnectedRunFailed):
    """The run's process died before it reported how the run ended. A checkpoint may let it resume."""


class RunInterrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) arrived during `Trainer.train` or `Trainer.test`, and the run has ended orderly.

    Raised after the last checkpoint is durable and the observers are drained, so that what follows the run in a program
    or in a shell (``train && deploy``, the next run of a sweep) does not start.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result
        """How the run ended; ``status`` is ``finished`` if the signal arrived after the last step."""

    def __str__(self) -> str:
        return _how_stopped(self.result, "SIGINT")


class RunTerminated(SystemExit):
    """SIGTERM arrived during `Trainer.train` or `Trainer.test`, and the run has ended orderly, as for `RunInterrupted`.

    Not caught, it ends the process with the exit code 143.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.code = 143  # 128 + SIGTERM, as a shell reports it
        self.result = result
        """How the run ended; ``status`` is ``finished`` if the signal arrived after the last step."""

    def __str__(self) -> str:
        return _how_stopped(self.result, "SIGTERM")


def _how_stopped(result: RunResult, name: str) -> str:
    text = f"{name} arrived: run {result.run_id} {result.status} after global_step {result.global_step}"
    return f"{text}; its checkpoint is {result.checkpoint}" if result.checkpoint is not None else text


def add_note(error: BaseException, text: str) -> None:
    """Say where an exception came from. One of the user's own kind may refuse: then it goes without."""
    with contextlib.suppress(Exception):
        error.add_note(text)
