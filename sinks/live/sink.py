"""The sink `Live`: a run that can be watched in a browser while it trains."""

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
from sinks.live.access import TOKEN_VARIABLE, choose_token
from sinks.live.hub import Hub
from sinks.live.runs import OneRun
from sinks.live.stored import read_view

if TYPE_CHECKING:
    from sinks.live.server import Server

ADDRESS_NAME = "live.json"
"""In the run's folder, while it is served: ``{"url": ...}``, with ``"token"`` if that was generated. Only its owner may
read it."""
_END_S = 2.0
"""How long those who watch may take to hear of the end."""


class Live(Strict, frozen=True):
    """Serves a page that shows the run as it happens, and the same as WebSocket and Server-Sent Events.

    ``stagecast watch`` does it for any run, from outside; this is for one that brings its page along. It runs in the
    sink host, which reads the journal: clients take neither the interpreter nor the memory of the process that trains.
    ``(Live(), Delivery(runs_in="thread"))`` serves from that process, also without a journal.

    Its link is printed on stderr, with the token in the fragment (``#token=...``). The address is in the log, and in
    ``live.json`` in the run's folder, from which ``connect(run_dir)`` reads it. The page ends with the run.
    """

    host: str = "127.0.0.1"
    """Any other than this machine's own demands a token."""
    port: int = 0
    """0 takes a free one."""
    commands: bool = False
    """Whether watchers may stop, pause, and have checkpoints taken."""
    token: str | bool | None = None
    """The token that watchers have to show. None: that of the environment variable ``STAGECAST_TOKEN``, else a new
    random one, which is in the printed link and in ``live.json``. False: none, so that every user of this machine may
    watch, and command the run with ``commands``."""
    origins: tuple[str, ...] = ()
    """Sites whose pages may talk to it, beside its own: ``https://example.org``."""

    # Lossless, because the page shows the whole history; late events only show late.
    delivery: ClassVar[Delivery] = Delivery(overflow="catch_up", latency_s=0.1, runs_in="process")

    def __repr__(self) -> str:
        return f"Live(host={self.host!r}, port={self.port!r}, commands={self.commands!r})"  # the token is a secret

    def __rich_repr__(self) -> Any:
        yield from (("host", self.host), ("port", self.port), ("commands", self.commands))  # so do tracebacks show it

    def check(self) -> None:
        """See that the server is installed, and the address guarded. Raises `SinkMisconfigured`."""
        require("uvicorn", "live", "the sink Live")
        require("websockets", "live", "the sink Live")
        if not (isinstance(self.port, int) and 0 <= self.port <= 65_535):
            raise SinkMisconfigured(f"Live(port={self.port!r:.80}) is no port: give 1 to 65535, or 0 for a free one")
        choose_token(self.token, self.host)

    def open(self, run: RunInfo) -> LiveWriter:
        """Begin to serve. Waits for the journal of earlier attempts. Raises `SinkMisconfigured`: the port is taken."""
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
        except BaseException:  # goes on as itself, without the port
            listening.close()
            raise


class LiveWriter:
    """An open `Live`."""

    def __init__(self, hub: Hub, server: Server, new_token: str | None = None) -> None:
        """Start the server, print its link, and write its address.

        Args:
            new_token: The server's token, if it is known to no one yet.
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
            told = {"url": server.url} | ({"token": new_token} if new_token is not None else {})
            try:
                replace_below(hub.run_dir, ADDRESS_NAME, msgspec.json.encode(told) + b"\n", mode=0o600)
            except OSError as error:
                logger.warning(f"the page's address cannot be written to {self._address}: {error}")

    @property
    def url(self) -> str:
        """Where the page is."""
        return self._server.url

    def write(self, events: Sequence[Event]) -> None:
        """Show a batch; what came already is left out."""
        self._hub.feed(events)

    def close(self) -> None:
        """End the server, once those who watch have seen the end."""
        self._hub.end(_END_S)
        self._server.stop()
        if self._address is not None:
            with contextlib.suppress(OSError):
                self._address.unlink()
