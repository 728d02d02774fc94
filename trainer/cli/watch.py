"""``stagecast watch``: the page of a run, or of all runs of a folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from events.errors import RunFolderError, SinkMisconfigured
from events.sink import require
from trainer.cli.text import complain, say


def watch(folder: Path, host: str, port: int, *, commands: bool, origins: list[str], has_token: bool = True) -> int:
    """Serve until a signal comes; returns the exit code.

    Args:
        has_token: Whether watchers have to show a token: that of ``STAGECAST_TOKEN``, or a new one.

    Raises:
        RunFolderError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is no folder: give that of a run, or one that has those of runs in it")
    try:
        for client in ("uvicorn", "websockets"):
            require(client, "live", "stagecast watch")
        live: Any = importlib.import_module("sinks.live.server")
        access: Any = importlib.import_module("sinks.live.access")
        token = access.choose_token(None if has_token else False, host)
        listening = live.bind(host, port)
    except SinkMisconfigured as error:
        complain(f"stagecast watch: error: {error}")
        return 2
    runs: Any = importlib.import_module("sinks.live.runs")
    server = live.Server(runs.RunsOfFolder(folder), listening, host, token=token, commands=commands, origins=origins)
    who = "Whoever has this link" if token is not None else "Every user of this machine"
    may = (
        "may watch the runs, stop them and pause them" if commands else "may watch the runs (--commands: and stop them)"
    )
    say(f"{folder} can be watched at {server.link}", f"{who} {may}. Ctrl-C ends the server, not the runs.")
    server.run()
    return 0
