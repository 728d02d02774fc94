"""``stagecast watch``: the page of a run, or of all runs in a folder or on a NATS server."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from events.errors import ArgumentsError, RunFolderError, SinkMisconfigured
from events.sink import require
from trainer.cli.text import echo


def watch(
    folder: str,
    host: str,
    port: int,
    *,
    commands: bool,
    origins: list[str],
    no_token: bool,
    alerts: list[str],
    push_tokens: str | None = None,
) -> int:
    """Serve until a signal arrives; returns the exit code.

    Args:
        folder: It may not exist yet. Or the address of a NATS server, with or without a run.
        alerts: Targets of alerts about the runs, or the fields of `sinks.Alert` as JSON.
        push_tokens: A file with the tokens of the projects whose runs are received: see `sinks.live.pushed`.
        no_token: Serve clients without a token; otherwise they need that of ``STAGECAST_TOKEN``, or a new one.

    Raises:
        RunFolderError: It is not a folder.
        ArgumentsError: It is the address of a NATS server, and not valid.
        ConnectionError: No NATS server answers there.
        SinkMisconfigured: A package is missing, the address cannot be served, or it needs a token.
    """
    is_nats = folder.lower().startswith(("nats://", "tls://"))
    if push_tokens is not None and is_nats:
        raise ArgumentsError("--push-tokens needs a folder for the runs; give one instead of the address")
    if not is_nats and os.path.lexists(folder) and not Path(folder).is_dir():
        raise RunFolderError(f"{folder} is not a folder; name a run folder, or a folder of run folders")
    for package in ("starlette", "uvicorn", "websockets"):
        require(package, "live", "stagecast watch")
    from sinks.live.runs import RunsOfFolder
    from sinks.live.server import Server, bind
    from sinks.live.token import choose_token

    told = [_alert(one) for one in alerts]
    pushes = None if push_tokens is None else _pushes(Path(folder), push_tokens)

    token = choose_token(False if no_token else None, host)
    listening = bind(host, port)
    with contextlib.ExitStack() as stack:
        stack.callback(listening.close)
        shown, path = (folder, folder) if not is_nats else _mirror(folder, stack)
        if told:
            from sinks.alerts.folder import FolderAlerts

            following = FolderAlerts(Path(path), told)
            following.start()
            stack.callback(following.stop)
        options: Any = {"token": token, "commands": commands, "origins": origins, "pushes": pushes}
        server = Server(RunsOfFolder(Path(path), keeps_notes=not is_nats), listening, host, **options)
        who = "Anyone with this link" if token is not None else "Every user of this machine"
        may = "may watch, stop and pause the runs" if commands else "may watch the runs (--commands: and stop them)"
        echo(f"{shown} can be watched at {server.link}", f"{who} {may}. Ctrl-C stops the server, not the runs.")
        if not is_nats and not Path(folder).is_dir():
            echo(f"{folder} does not exist yet: the page shows its runs as soon as one starts.")
        server.run()
    return 0


def _pushes(folder: Path, tokens: str) -> Any:
    """Receive the runs of projects into a folder, which is made if it is missing."""
    from sinks.live.pushed import read_tokens
    from sinks.live.pushes import Pushes

    found = read_tokens(tokens)
    folder.mkdir(parents=True, exist_ok=True)
    return Pushes(folder, found)


def _alert(text: str) -> Any:
    """Build an alert, and check its target."""
    from sinks.registry import build_sink

    fields: Any = {"to": text}
    if text.lstrip().startswith("{"):
        try:
            fields = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise SinkMisconfigured(f"--alert {text!r:.80} is not JSON: {error}") from None
    alert: Any = build_sink("alert", fields)
    alert.check()
    return alert


def _mirror(url: str, stack: contextlib.ExitStack) -> tuple[str, str]:
    """Copy the runs of a NATS server to a temporary folder as long as the stack lasts; return its address and path."""
    require("nats", "nats", "stagecast watch")
    from sinks.nats.address import NatsAddress
    from sinks.nats.mirror import NatsMirror

    try:
        address = NatsAddress.of(url)
    except ValueError as error:
        raise ArgumentsError(str(error)) from None
    # The server raises a signal again when it has stopped; then the folder is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    path = stack.enter_context(tempfile.TemporaryDirectory(prefix="stagecast-nats-", ignore_cleanup_errors=True))
    mirror = NatsMirror(address, Path(path))
    mirror.start()
    stack.callback(mirror.stop)
    return address.server, path
