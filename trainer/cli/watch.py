"""``stagecast watch``: the page of a run, or of all runs in a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from events.errors import RunFolderError, SinkMisconfigured
from events.sink import require
from trainer.cli.text import echo, echo_error


def watch(folder: Path, host: str, port: int, *, commands: bool, origins: list[str], has_token: bool = True) -> int:
    """Serve until a signal arrives; returns the exit code.

    Args:
        has_token: Whether clients need a token: that of ``STAGECAST_TOKEN``, or a new one.

    Raises:
        RunFolderError: There is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder; name a run folder, or a folder of run folders")
    try:
        for client in ("starlette", "uvicorn", "websockets"):
            require(client, "live", "stagecast watch")
        live: Any = importlib.import_module("sinks.live.server")
        tokens: Any = importlib.import_module("sinks.live.token")
        token = tokens.choose_token(None if has_token else False, host)
        listening = live.bind(host, port)
    except SinkMisconfigured as error:
        echo_error(f"stagecast watch: error: {error}")
        return 2
    runs: Any = importlib.import_module("sinks.live.runs")
    server = live.Server(runs.RunsOfFolder(folder), listening, host, token=token, commands=commands, origins=origins)
    who = "Anyone with this link" if token is not None else "Every user of this machine"
    may = (
        "may watch the runs, stop them and pause them" if commands else "may watch the runs (--commands: and stop them)"
    )
    echo(f"{folder} can be watched at {server.link}", f"{who} {may}. Ctrl-C stops the server, not the runs.")
    server.run()
    return 0
