"""Errors of the trainer: arguments that cannot work, and modules that break the contract.

StagecastError                    (events.errors)
├── ArgumentsError                (events.errors)
├── ContractError                 the user's module breaks the contract
│   ├── DataLoaderError           a method returned something other than a dataloader; also a TypeError
│   │   └── EmptyDataLoader       a dataloader yielded no batch
│   ├── StepOutputError           a step returned no loss tensor, or outputs of a wrong type; also a TypeError
│   ├── BatchWeightError          batch_weight returned an invalid weight; also a ValueError
│   ├── OptimizerError            get_optimizers_schedulers returned something else; also a TypeError
│   ├── SignatureError            a hook does not accept the outputs of the step; also a TypeError
│   └── MetricNotFound            the monitored metric was never logged; also a LookupError
├── NonFiniteError                NaN or infinity ended the run; also an ArithmeticError
│   ├── NonFiniteLossError        in the loss
│   └── NonFiniteGradientError    in a gradient of a finite loss
├── EpochOutputsTooLarge          outputs kept for the end of an epoch exceed their limit; also a MemoryError
├── PrecisionError                this torch does not support the requested precision
├── PeerFailed                    another rank of a distributed run has failed
├── LaunchedRunFailed             a launched run raised an exception in its own process
├── LaunchedRunCrashed            the process of a launched run died before it reported the run's end
└── ConnectError                  a run cannot be watched over the network
    ├── ProtocolViolated          the server's answer does not follow the protocol
    ├── ConnectionLost            the server was unreachable for too long, or the block of `connect` was left
    ├── CommandRefused            the server refused a command
    └── ConnectedRunFailed        the run failed where it runs
        └── ConnectedRunLost      its process died before it reported the run's end

KeyboardInterrupt
└── RunInterrupted                SIGINT (Ctrl-C) stopped `Trainer.train` or `Trainer.test` at a step boundary
SystemExit
└── RunTerminated                 SIGTERM stopped `Trainer.train` or `Trainer.test` at a step boundary

An exception of the user's own code propagates unchanged. An exception in another process cannot: `LaunchedRunFailed`
carries its type, text and traceback.
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
"""Remedies against NaN, for messages."""


class ContractError(StagecastError):
    """The user's module breaks the contract; names the method and its return value."""


class DataLoaderError(ContractError, TypeError):
    """A method that returns dataloaders returned something else."""


class EmptyDataLoader(DataLoaderError):
    """A dataloader yielded no batch, so there is nothing to train or evaluate."""


class StepOutputError(ContractError, TypeError):
    """A step returned something other than a loss tensor, or a tuple that begins with one."""


class BatchWeightError(ContractError, ValueError):
    """`ModuleInterface.batch_weight` returned an invalid weight, or only zeros for a whole step."""


class OptimizerError(ContractError, TypeError):
    """`get_optimizers_schedulers` did not return optimizers and schedulers."""


class SignatureError(ContractError, TypeError):
    """A hook accepts another number of outputs than the step returned."""


class MetricNotFound(ContractError, LookupError):
    """The monitored metric was neither logged nor computed; names the metrics that were."""


class NonFiniteError(StagecastError, ArithmeticError):
    """NaN or infinity ended the run: ``non_finite="stop"``, or too many consecutive skipped steps."""


class NonFiniteLossError(NonFiniteError):
    """The loss was NaN or infinite."""


class NonFiniteGradientError(NonFiniteError):
    """A gradient was NaN or infinite while the loss was finite."""


class EpochOutputsTooLarge(StagecastError, MemoryError):
    """The outputs kept for the end of an epoch exceed their limit; names the hook and a fix."""


class PrecisionError(StagecastError):
    """This version of torch does not support the requested precision."""


class PeerFailed(StagecastError):
    """Another rank of a distributed run has failed, and the run with it; the message names it, its host and its phase.

    Uncaught, it ends the process with exit code 3.
    """

    def __init__(self, message: str, *, rank: int = 0, host: str = "", phase: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        """The rank that failed."""
        self.host = host
        self.phase = phase
        """What it was doing: the name of a method or hook, or a few words."""
        self.reported = False
        """Whether it was logged."""


class LaunchedRunFailed(StagecastError):
    """A launched run, or the factory of its trainer, raised an exception in its own process."""

    def __init__(self, message: str, *, type_name: str = "", text: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        """The exception's type: ``ValueError``, ``my_package.errors.Diverged``."""
        self.text = text
        self.traceback = traceback
        """As Python prints it, with the chained exceptions."""


class LaunchedRunCrashed(StagecastError):
    """The process of a launched run died before the run ended: a crash, the out-of-memory killer, `os._exit`."""

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
        """The exit code; minus the signal number if a signal killed it; None if unknown."""
        self.last_events = list(last_events)
        """The end of its journal."""
        self.log_tail = log_tail
        """The end of its output."""

    @property
    def signal(self) -> str | None:
        """The name of the signal that killed it, such as ``SIGKILL``; None if it exited."""
        return signal_name(self.returncode)


class ConnectError(StagecastError):
    """A run cannot be watched over the network; the message names the server and a fix."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the server's answer; None without an answer."""


class ProtocolViolated(ConnectError):
    """The server's answer does not follow the protocol: too large, compressed, of a wrong type or out of order."""


class ConnectionLost(ConnectError):
    """The server was unreachable for longer than ``give_up_s``, or the block of `connect` was left."""


class CommandRefused(ConnectError):
    """The server refused a command."""


class ConnectedRunFailed(ConnectError):
    """The run failed where it runs."""

    def __init__(self, message: str, result: RunResult | None = None) -> None:
        super().__init__(message)
        self.result = result
        """The run's result, as far as it is known."""


class ConnectedRunLost(ConnectedRunFailed):
    """The run's process died before it reported the run's end. The run may be resumed from a checkpoint."""


class RunInterrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) stopped `Trainer.train` or `Trainer.test` at a step boundary.

    Raised after the last checkpoint is durable and the observers are drained, so that the next step of a program or
    shell (``train && deploy``, the next run of a sweep) does not start.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result
        """The run's result; ``status`` is ``finished`` if the signal arrived after the last step."""

    def __str__(self) -> str:
        return _how_stopped(self.result, "SIGINT")

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the person who stopped the run knows where."""
        return [f"{type(self).__name__}: {self}"]


class RunTerminated(SystemExit):
    """SIGTERM stopped `Trainer.train` or `Trainer.test`, as SIGINT does (`RunInterrupted`).

    Uncaught, it ends the process with exit code 143.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.code = 143  # 128 + SIGTERM, as a shell reports it
        self.result = result
        """The run's result; ``status`` is ``finished`` if the signal arrived after the last step."""

    def __str__(self) -> str:
        return _how_stopped(self.result, "SIGTERM")


def _how_stopped(result: RunResult, name: str) -> str:
    text = f"{name} arrived: run {result.run_id} {result.status} after global_step {result.global_step}"
    return f"{text}; its checkpoint is {result.checkpoint}" if result.checkpoint is not None else text


def add_note(error: BaseException, text: str) -> None:
    """Add a note to an exception, unless its class (the user's own) refuses notes."""
    with contextlib.suppress(Exception):
        error.add_note(text)
