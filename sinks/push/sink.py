"""A sink that sends a run to a central page."""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar
from urllib.parse import urlsplit

from events.errors import SinkMisconfigured
from events.masking import masked_url
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from events.text import plain_text
from sinks.continued import ContinuedWriter
from sinks.live.token import check_token_text

TOKEN_VARIABLE = "STAGECAST_PUSH_TOKEN"
PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""The name of a project, which is also a folder of the server."""


class Push(Strict, frozen=True):
    """Sends a run to a central page, from a machine that nobody can connect to::

        $ stagecast watch runs --push-tokens tokens.txt                  # there: PROJECT=TOKEN lines
        Trainer(module, arguments, sinks=[Push("https://runs.example.org", project="vision")]).train()

    **Delivery.** Only outgoing HTTP requests are made, through the proxy of ``HTTPS_PROXY`` if there is one. The server
    answers with the newest event that is durable there, and the sink continues behind it: each event is there once and
    in order, whichever side is killed. The journal is the queue, so an outage of hours costs neither memory nor an
    event. The sink runs in the sink host; the loop never waits for the server. At the end of the run the sink has the
    drain's time (`TrainerArguments.drain_timeout_s`), 3 s if the server is away; the result, the log and the page name
    the number of undelivered events. ``stagecast replay RUN --to push url=URL project=PROJECT`` sends them later.

    **Content.** Events, and the media files that the module logs. Checkpoints stay where they are. An event whose
    line exceeds 2 MiB is replaced by a `JournalGap`, and a file beyond 64 MiB is skipped, each with a warning.

    **Liveness.** Without events the sink reports every 10 s that it is there. After 30 s of silence the page shows the
    run as silent, not as lost: it may be training behind a broken network. The page sends it no commands.

    **Access.** The token admits the run to one project, and to nothing else. A wrong one disables the sink, with a
    warning.

    **Names.** Two runs with one ``run_id`` cannot share a project: the sink of the later one is disabled.
    """

    url: str
    """The address of the page, perhaps with a path: ``https://example.org/runs/``."""
    token: str | None = None
    """The project's token. None: that of the environment variable ``STAGECAST_PUSH_TOKEN``."""
    project: str = "default"
    """Letters, digits, ``-`` and ``_``."""

    # The server may be away for hours: the journal is the queue.
    delivery: ClassVar[Delivery] = Delivery(
        overflow="catch_up",
        latency_s=0.5,
        batch=4_096,
        timeout_s=120.0,
        retries=2**31 - 1,
        max_backoff_s=5.0,
        runs_in="process",
    )

    def __repr__(self) -> str:
        return f"Push({self._shown!r}, project={self.project!r})"  # the token is a secret

    def __rich_repr__(self) -> Any:
        yield from (self._shown, ("project", self.project))  # for rich tracebacks

    @property
    def _shown(self) -> str:
        return plain_text(masked_url(self.url), 200) if isinstance(self.url, str) else "..."

    def check(self) -> None:
        """Raise `SinkMisconfigured` for a wrong option, without a token, or if the client is not installed."""
        if not _is_address(self.url):
            raise SinkMisconfigured(
                f"Push: {self._shown!r} is not the address of a page; give one like https://HOST[:PORT][/PATH], and the"
                " token as token="
            )
        if not (isinstance(self.project, str) and PROJECT.fullmatch(self.project)):
            raise SinkMisconfigured(
                f"Push(project={self.project!r:.80}) is not a name; give at most 64 letters, digits, - and _"
            )
        if not isinstance(token := self._token(), str):
            raise SinkMisconfigured(f"Push has no token; give token=, or set the environment variable {TOKEN_VARIABLE}")
        check_token_text(token)
        require("httpx", "live", "the sink Push")

    def _token(self) -> str | None:
        return self.token if self.token is not None else os.environ.get(TOKEN_VARIABLE)

    def open(self, run: RunInfo) -> ContinuedWriter:
        """Connect, and find the run's newest event at the server.

        Raises:
            SinkMisconfigured: A setting is invalid, or the server refuses the token or takes no runs.
            ConnectionError: The server is away. A retry may help.
        """
        self.check()
        from sinks.push.sender import Sender  # needs httpx

        token = self._token()
        assert token is not None
        url = self.url if self.url.endswith("/") else f"{self.url}/"
        return ContinuedWriter(Sender(url, self.project, token, run), run.run_dir, "Push")


def _is_address(url: object) -> bool:
    """Whether it is the address of a page, without a password."""
    try:
        parts = urlsplit(url) if isinstance(url, str) and url.isprintable() else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return False
    except ValueError:
        return False
    return not (parts.query or parts.fragment or parts.username)
