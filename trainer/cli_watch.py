"""``stagecast watch``: the page of a run, or of all runs of a folder."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from events.errors import RunFolderError, SinkMisconfigured
from events.sink import require


def watch(folder: Path, host: str, port: int, *, commands: bool, origins: list[str]) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        RunFolderError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is no folder: give that of a run, or one that has those of runs in it")
    token = os.environ.get("STAGECAST_TOKEN") or None
    try:
        for client in ("uvicorn", "websockets"):
            require(client, "live", "stagecast watch")
        live: Any = importlib.import_module("sinks.live.server")
        live.check_host(host, token)
        listening = live.bind(host, port)
    except SinkMisconfigured as error:
        print(f"stagecast watch: error: {error}", file=sys.stderr)
        return 2
    runs: Any = importlib.import_module("sinks.live.runs")
    server = live.Server(runs.RunsOfFolder(folder), listening, host, token=token, commands=commands, origins=origins)
    may = "may also stop and pause runs" if commands else "may not command runs (--commands)"
    print(f"{folder} can be watched at {server.link}\nWho opens it {may}. Ctrl-C ends it; runs go on.", flush=True)
    server.run()
    return 0
