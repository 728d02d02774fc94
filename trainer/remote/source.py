"""Where a run over the network comes from: what `connect` asks of it, by whatever protocol."""

from __future__ import annotations

from typing import Protocol

from trainer.errors import ProtocolViolated
from trainer.remote.result import RunSnapshot


class JournalLines(Protocol):
    """The events of a run behind a cursor, as lines of JSON."""

    async def chunk(self) -> bytes:
        """Wait for the next bytes; none at the end. An empty line is a sign of life."""
        ...

    async def aclose(self) -> None:
        """Stop reading."""
        ...


class RunSource(Protocol):
    """The server of a run. Belongs to one event loop, and is not trusted.

    A failure that a later attempt may not meet raises `trainer.remote.http.Unreachable`, any other one a
    `trainer.errors.ConnectError`.
    """

    url: str
    """Its address, without secrets."""
    run_id: str
    """The run that is asked for; empty until `choose` has found it."""
    give_up_s: float
    """Maximum seconds that it may be out of reach."""
    over: bool
    """Whether the run is known to have ended, so that its server may be gone."""

    @property
    def summarises(self) -> bool:
        """Whether a snapshot has the metrics and checkpoints up to its cursor; otherwise all events have to be read."""
        ...

    @property
    def shown_run(self) -> str:
        """The run's name for messages: it may come from the server."""
        ...

    async def choose(self) -> None:
        """Find the one run that the server has. Raises `ConnectError` if it has several, or none."""
        ...

    async def snapshot(self) -> RunSnapshot:
        """Ask for the state of the run."""
        ...

    async def command(self, data: bytes) -> None:
        """Send an encoded command."""
        ...

    async def journal(self, since: int) -> JournalLines:
        """Open a stream of the events after a cursor, until the end of the run. The caller closes it."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...

    def violated(self, what: str) -> ProtocolViolated:
        """The error for an answer that no server of runs sends."""
        ...
