"""Commands that other processes leave in a run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import pytest

from events.errors import RunFolderError
from events.messages import CommandTaken, TrainStepEnded
from events.protocol import Pause, Resume, Stop
from events.run.folder import is_held
from events.run.inbox import COMMANDS_DIR, send_command


def test_a_command_to_a_run_that_is_over_is_refused(kit: Any, tmp_path: Path) -> None:
    """Rather than left for one that comes later."""
    kit.train(kit.Net(), run_dir=tmp_path / "run", journal=True)
    assert not is_held(tmp_path / "run")
    with pytest.raises(RunFolderError, match="no run is under way"):
        send_command(tmp_path / "run", Stop(id="1"))
    assert not (tmp_path / "run" / COMMANDS_DIR).exists()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_commands_are_taken_in_order_and_once(kit: Any, tmp_path: Path, backend: str) -> None:
    """What is no command is told of and left out; what was meant for an earlier attempt is not taken."""
    folder = tmp_path / "run" / COMMANDS_DIR
    folder.mkdir(parents=True)
    (folder / "0.json").write_text('{"command":"stop","id":"stale"}')
    taken: list[CommandTaken] = []

    async def main() -> None:
        ready = kit.make_trainer(kit.Net(), run_dir=tmp_path / "run", run_id="run", epochs=10**6)
        with anyio.fail_after(kit.WAIT_S):
            async with ready.run() as run:
                async for _ in run.events(types=[TrainStepEnded]):
                    break
                assert is_held(tmp_path / "run")
                (folder / "00.json").write_text("garbage")
                for command in (Pause(id="a"), Resume(id="b"), Stop(id="c", reason="enough")):
                    send_command(tmp_path / "run", command)
                async for event in run.events(since=0, types=[CommandTaken]):
                    taken.append(event)
                result = await run.result()
        assert (result.status, result.reason) == ("stopped", "enough")

    anyio.run(main, backend=backend)
    assert taken[-1].command_id == "c"
    assert "stale" not in {event.command_id for event in taken}
    assert os.listdir(folder) == []


def test_a_command_left_while_the_run_is_set_up_is_taken(kit: Any, tmp_path: Path) -> None:
    """The folder is held from then on, so the sender was told that it is under way."""

    ready = kit.make_trainer(kit.Net(), run_dir=tmp_path / "run", run_id="run", epochs=10**6)
    build = ready._session

    def built(*args: Any, **options: Any) -> Any:
        session = build(*args, **options)
        send_command(tmp_path / "run", Stop(id="early", reason="early"))
        return session

    ready._session = built
    assert ready.train().reason == "early"
