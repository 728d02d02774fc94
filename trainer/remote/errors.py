"""Errors of watching a run over the network.

StagecastError                (events.errors)
└── ConnectError              the server cannot be reached, or refuses
    ├── ProtocolViolated      an answer that no server of runs sends: its size, encoding, types or order
    ├── ConnectionLost        it was there, and has been out of reach for too long; or the block was left
    ├── CommandRefused        it did not take a command
    └── ConnectedRunFailed    the run has failed where it runs; has its result
        └── ConnectedRunLost  its process has died without saying how the run ended
"""

from __future__ import annotations

from events.errors import StagecastError
from events.protocol import RunResult


class ConnectError(StagecastError):
    """A run cannot be watched over the network; the message says where, why, and what to do."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """Of the server's answer; None if there was none."""


class ProtocolViolated(ConnectError):
    """The server sends an answer that no server of runs sends: too large, encoded, of other types or out of order."""


class ConnectionLost(ConnectError):
    """The server has been out of reach for longer than ``give_up_s``, or the block of `connect` has been left."""


class CommandRefused(ConnectError):
    """The server did not take a command."""


class ConnectedRunFailed(ConnectError):
    """The run has failed where it runs."""

    def __init__(self, message: str, result: RunResult | None = None) -> None:
        super().__init__(message)
        self.result = result
        """What is known of its end."""


class ConnectedRunLost(ConnectedRunFailed):
    """The run's process has died without saying how the run ended. It may be taken up again from a checkpoint."""
