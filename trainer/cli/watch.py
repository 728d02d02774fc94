"""``stagecast watch``: the page of a run, or of all runs in a folder."""

from __future__ import annotations

from pathlib import Path

from events.errors import RunFolderError
from events.sink import require
from trainer.cli.text import echo


def watch(folder: str, host: str, port: int, *, commands: bool, origins: list[str], no_token: bool) -> int:
    """Serve until a signal arrives; returns the exit code.

    Args:
        no_token: Serve clients without a token; otherwise they need that of ``STAGECAST_TOKEN``, or a new one.

    Raises:
        RunFolderError: There is no such folder.
        SinkMisconfigured: A package is missing, the address cannot be served, or it needs a token.
    """
    if not Path(folder).is_dir():
        raise RunFolderError(f"{folder} is not a folder; name a run folder, or a folder of run folders")
    for package in ("starlette", "uvicorn", "websockets"):
        require(package, "live", "stagecast watch")
    from sinks.live.runs import RunsOfFolder
    from sinks.live.server import Server, bind
    from sinks.live.token import choose_token

    token = choose_token(False if no_token else None, host)
    listening = bind(host, port)
    server = Server(RunsOfFolder(Path(folder)), listening, host, token=token, commands=commands, origins=origins)
    who = "Anyone with this link" if token is not None else "Every user of this machine"
    may = "may watch, stop and pause the runs" if commands else "may watch the runs (--commands: and stop them)"
    echo(f"{folder} can be watched at {server.link}", f"{who} {may}. Ctrl-C stops the server, not the runs.")
    server.run()
    return 0
