"""Commands that other processes leave in a run's folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.threads import WAIT_S
from support.training import Net, make_trainer, train

from events.errors import RunFolderError
from events.messages import CommandTaken, TrainStepEnded
from events.protocol import Pause, Resume, Stop
from events.run import inbox
from events.run.folder import RunFolder, is_held
from events.run.inbox import COMMANDS_DIR, FolderCommands, commands_of
from trainer.loop.control import Control


def test_a_command_to_a_run_that_is_over_is_refused(tmp_path: Path) -> None:
    train(Net(), run_dir=tmp_path / "run", journal=True)
    assert not is_held(tmp_path / "run")
    with pytest.raises(RunFolderError, match="no run is under way"):
        FolderCommands(tmp_path / "run").send(Stop(id="1"))
    assert not (tmp_path / "run" / COMMANDS_DIR).exists()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_commands_are_taken_in_order_and_once(tmp_path: Path, backend: str) -> None:
    """Files that are not commands are reported and skipped; commands for an earlier attempt are not taken."""
    folder = tmp_path / "run" / COMMANDS_DIR
    folder.mkdir(parents=True)
    (folder / "0.json").write_text('{"command":"stop","id":"stale"}')
    taken: list[CommandTaken] = []

    async def main() -> None:
        ready = make_trainer(Net(), run_dir=tmp_path / "run", run_id="run", epochs=10**6)
        with anyio.fail_after(WAIT_S):
            async with ready.run() as run:
                async for _ in run.events(types=[TrainStepEnded]):
                    break
                assert is_held(tmp_path / "run")
                (folder / "00.json").write_text("garbage")
                for command in (Pause(id="a"), Resume(id="b"), Stop(id="c", reason="enough")):
                    FolderCommands(tmp_path / "run").send(command)
                async for event in run.events(since=0, types=[CommandTaken]):
                    taken.append(event)
                result = await run.result()
        assert (result.status, result.reason) == ("stopped", "enough")

    anyio.run(main, backend=backend)
    assert taken[-1].command_id == "c"
    assert "stale" not in {event.command_id for event in taken}
    assert os.listdir(folder) == []


def test_a_run_in_this_process_takes_a_command_without_a_file_but_a_forked_process_writes_one(tmp_path: Path) -> None:
    """Whichever path leads to its folder. In the forked process the loop does not run."""
    run_dir, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run_dir)
    control = Control()
    with RunFolder.open(run_dir, "run"):
        one = inbox.Inbox(run_dir, control, time.time_ns())
        one.start()
        commands_of(link).send(Stop(id="here"))
        assert [command.id for command in control.take()] == ["here"]
        assert not (run_dir / COMMANDS_DIR).exists()
        if (pid := os.fork()) == 0:
            os._exit(isinstance(commands_of(run_dir), FolderCommands))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        one.stop()
        assert isinstance(commands_of(run_dir), FolderCommands)


def test_a_command_left_while_the_run_is_set_up_is_taken(tmp_path: Path) -> None:
    """The run holds its folder from then on, so the command is accepted."""

    ready = make_trainer(Net(), run_dir=tmp_path / "run", run_id="run", epochs=10**6)
    build = ready._session

    def built(*args: Any, **options: Any) -> Any:
        session = build(*args, **options)
        FolderCommands(tmp_path / "run").send(Stop(id="early", reason="early"))
        return session

    ready._session = built
    assert ready.train().reason == "early"


def test_commands_that_came_with_the_folder_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their names, which an archived folder may have chosen."""
    monkeypatch.setattr(inbox, "_COARSE_NS", 0)
    folder = tmp_path / COMMANDS_DIR
    folder.mkdir()
    for time_ns in (2**62, 10**20, time.time_ns() + 20 * 10**9):
        (folder / f"{time_ns:020d}-0.json").write_text('{"command":"stop","id":"planted"}')
    control = Control()
    while time.time_ns() <= max(entry.stat().st_ctime_ns for entry in folder.iterdir()):
        pass
    one = inbox.Inbox(tmp_path, control, time.time_ns())
    one.start()
    assert os.listdir(folder) == []
    one.stop()
    assert control.take() == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to give a file away")
def test_a_command_of_another_user_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The user who owns the folder is accepted, in a container that trains as root."""
    control = Control()
    one = inbox.Inbox(tmp_path, control, time.time_ns())
    os.chown(tmp_path, 4_243, 4_243)
    one.start()
    folder = tmp_path / COMMANDS_DIR
    folder.mkdir()
    for number, owner in enumerate((4_242, 4_243)):
        part = tmp_path / "part"
        part.write_text(f'{{"command":"pause","id":"{owner}"}}')
        os.chown(part, owner, owner)
        part.rename(folder / f"{time.time_ns():020d}-{number}.json")
    control.wait(30)
    one.stop()
    assert [command.id for command in control.take()] == ["4243"]
    assert "it belongs to another user (4242)" in caplog.text
