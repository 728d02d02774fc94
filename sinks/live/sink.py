"""The sink `Live`: a page that shows a run in a browser while it trains."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from events.errors import SinkMisconfigured
from events.journal.segment import JOURNAL_DIR
from events.log import logger
from events.messages import Event
from events.notice import notify
from events.safe_files import replace_below
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.live.hub import Hub
from sinks.live.runs import OneRun
from sinks.live.stored import read_view
from sinks.live.token import TOKEN_VARIABLE, choose_token

if TYPE_CHECKING:
    from sinks.live.server import Server

ADDRESS_NAME = "live.json"
"""File in the run folder while the page is served: ``{"url": ...}``, and ``"token"`` if that was generated. Readable by
its owner only."""
_END_S = 2.0
"""Maximum seconds that the end of the run waits for clients."""


class Live(Strict, frozen=True):
    """Serves a page that shows the run live, with WebSocket and Server-Sent Events for other clients.

    ``stagecast watch`` serves any run from outside; this sink makes a run serve its own page. It runs in the sink host,
    which reads the journal: clients use neither the interpreter nor the memory of the training process.
    ``(Live(), Delivery(runs_in="thread"))`` serves from the training process, also without a journal.

    The link is printed on stderr, with the token in the fragment (``#token=...``). The address is logged, and written
    to ``live.json`` in the run folder, from which ``connect(run_dir)`` reads it. The server stops with the run.
    """

    host: str = "127.0.0.1"
    """An address that other machines can reach requires a token."""
    port: int = 0
    """0 for a free port."""
    commands: bool = False
    """Whether clients may stop and pause the run, and request checkpoints."""
    token: str | bool | None = None
    """The token that clients must send. None: that of the environment variable ``STAGECAST_TOKEN``, otherwise a new
    random one, which is in the printed link and in ``live.json``. False: none, so that every user of this machine may
    see the run, and command it with ``commands``."""
    origins: tuple[str, ...] = ()
    """Further sites whose pages may use the server: ``https://example.org``."""

    # Lossless, because the page shows the whole history.
    delivery: ClassVar[Delivery] = Delivery(overflow="catch_up", latency_s=0.1, runs_in="process")

    def __repr__(self) -> str:
        return f"Live(host={self.host!r}, port={self.port!r}, commands={self.commands!r})"  # the token is a secret

    def __rich_repr__(self) -> Any:
        yield from (("host", self.host), ("port", self.port), ("commands", self.commands))  # for rich tracebacks

    def check(self) -> None:
        """Raise `SinkMisconfigured` without the server's packages, for an invalid port, or without a required token."""
        for module in ("starlette", "uvicorn", "websockets"):
            require(module, "live", "the sink Live")
        if not (isinstance(self.port, int) and 0 <= self.port <= 65_535):
            raise SinkMisconfigured(f"Live(port={self.port!r:.80}) is not a port; give 1 to 65535, or 0 for a free one")
        choose_token(self.token, self.host)

    def open(self, run: RunInfo) -> LiveWriter:
        """Start to serve; waits for the journal of earlier attempts. Raises `SinkMisconfigured` if the port is used."""
        from sinks.live.server import Server, bind  # needs uvicorn

        self.check()
        token = choose_token(self.token, self.host)
        is_new = self.token is None and not os.environ.get(TOKEN_VARIABLE)
        run_dir = Path(run.run_dir) if run.run_dir is not None else None
        listening = bind(self.host, self.port)
        try:
            hub = Hub(run_dir)
            if run_dir is not None and (run_dir / JOURNAL_DIR).is_dir():
                hub.view, _ = read_view(run_dir)
            hub.view.run.run_id = run.run_id
            options: dict[str, Any] = {"token": token, "commands": self.commands, "origins": self.origins}
            return LiveWriter(hub, Server(OneRun(hub), listening, self.host, **options), token if is_new else None)
        except BaseException:  # propagates unchanged
            listening.close()
            raise


class LiveWriter:
    """An open `Live`."""

    def __init__(self, hub: Hub, server: Server, new_token: str | None = None) -> None:
        """Start the server, print its link, and write `ADDRESS_NAME`.

        Args:
            new_token: The server's token, if it was generated.
        """
        self._hub = hub
        self._server = server
        self._address = hub.run_dir / ADDRESS_NAME if hub.run_dir is not None else None
        server.start()
        without_token = f"the run can be watched at {server.url}"
        if new_token is not None and self._address is not None:
            without_token += f"; its token is in {self._address}"
        notify(f"the run can be watched at {server.link}", without_token)
        if hub.run_dir is not None:
            address = {"url": server.url} | ({"token": new_token} if new_token is not None else {})
            try:
                replace_below(hub.run_dir, ADDRESS_NAME, msgspec.json.encode(address) + b"\n", mode=0o600)
            except OSError as error:
                logger.warning(f"the page's address cannot be written to {self._address}: {error}")

    @property
    def url(self) -> str:
        """Address of the page."""
        return self._server.url

    def write(self, events: Sequence[Event]) -> None:
        """Add a batch to the page; events that it has already are skipped."""
        self._hub.feed(events)

    def close(self) -> None:
        """Stop the server, once the clients have received the end of the run."""
        self._hub.end(_END_S)
        self._server.stop()
        if self._address is not None:
            with contextlib.suppress(OSError):
                self._address.unlink()
