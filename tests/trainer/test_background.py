"""Runs that `Trainer.start` begins: no block holds them, and any thread and event loop may ask for them."""

from __future__ import annotations

import gc
import signal
import threading
import traceback
from pathlib import Path

import anyio
import pytest
import torch
from support.scripts import Start
from support.threads import WAIT_S, trainer_threads, wait_until
from support.training import Boom, Net, failing, make_trainer, read_journal

from events.errors import CursorError, RunFolderHeld, StagecastError
from events.messages import RunEnded, TrainStepEnded
from events.protocol import RunResult
from events.run.run import Run
from trainer.run.place import RunPlace

MANY = 100_000  # epochs: more than any test waits for


async def result_of(run: Run) -> RunResult:
    with anyio.fail_after(WAIT_S):
        return await run.result()


@pytest.mark.both_event_loops
@pytest.mark.anyio
async def test_a_started_run_trains_while_its_caller_goes_on() -> None:
    """Its events and its result come to another event loop; its weights are those of `train`."""
    going_on = threading.Event()
    net, same = Net(act=lambda step: step < 3 or going_on.wait(WAIT_S)), Net()
    run = make_trainer(net, epochs=2, run_id="started", journal=True).start()
    assert repr(run) == "Run('started')"
    steps = []
    async for event in run.events(since=0, types=[TrainStepEnded]):
        steps.append(event.global_step)
        going_on.set()
    result = await result_of(run)
    expected = make_trainer(same, epochs=2).train()
    assert (result.status, result.metrics) == ("finished", expected.metrics)
    assert steps == list(range(1, expected.global_step + 1))
    assert torch.equal(net.linear.weight, same.linear.weight)
    assert await result_of(run) is result


@pytest.mark.anyio
async def test_a_started_run_takes_commands_on_any_thread() -> None:
    trainer = make_trainer(Net(), epochs=MANY, run_id="commanded", journal=True, checkpoints=True)
    run = trainer.start()
    with pytest.raises(StagecastError, match=r"run commanded of this trainer is still under way; run.stop\(\) ends it"):
        trainer.start()
    assert await anyio.Path(await run.checkpoint()).is_dir()
    await anyio.to_thread.run_sync(run.stop, "enough")
    result = await result_of(run)
    assert (result.status, result.reason) == ("stopped", "enough")
    assert result.checkpoint is not None
    again = trainer.start()
    again.stop()
    assert (await result_of(again)).status == "stopped"
    wait_until(lambda: not trainer_threads(), "a thread has not ended")


@pytest.mark.anyio
async def test_the_result_of_a_started_run_raises_its_exception(caplog: pytest.LogCaptureFixture) -> None:
    """The log has it before anyone asks; what prevents the start is raised there."""
    error = Boom("mine")
    run = make_trainer(failing(error), run_id="failing", journal=True).start()
    with pytest.raises(Boom) as caught:
        await result_of(run)
    assert caught.value is error
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert not [name for name in frames if "asyncio" in name or "_eventloop" in name]
    with pytest.raises(Boom):
        await result_of(run)
    assert len(traceback.extract_tb(error.__traceback__)) == len(frames)
    assert "the run failed after global_step 1: Boom: mine" in caplog.messages
    running = make_trainer(Net(), epochs=MANY, run_dir="held", journal=True).start()
    with pytest.raises(RunFolderHeld):
        make_trainer(Net(), run_dir="held", journal=True).start()
    running.stop()
    await result_of(running)


def test_a_start_after_an_interrupted_one_names_the_reason_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a notebook interrupts the cell while a checkpoint is fetched, and runs it again."""
    opened, trainer = threading.Event(), make_trainer(Net(), run_id="interrupted", journal=True)
    caller, place = threading.get_ident(), trainer._place

    def interrupted() -> RunPlace:
        signal.pthread_kill(caller, signal.SIGINT)
        assert opened.wait(WAIT_S)
        return place()

    monkeypatch.setattr(trainer, "_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.start()
    with pytest.raises(StagecastError, match=r"interrupted start\(\) .* still opening its run; call start\(\) again"):
        trainer.start()
    opened.set()
    wait_until(lambda: not trainer_threads(), "the run has not ended")


@pytest.mark.anyio
async def test_a_started_run_without_a_journal_has_no_events_to_read() -> None:
    run = make_trainer(Net(), run_id="silent").start()
    with pytest.raises(CursorError, match="run silent has no journal"):
        run.events(since=0)
    assert (await result_of(run)).status == "finished"


def test_a_run_to_which_nothing_refers_stops_with_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """As when a cell that starts it is run again."""
    run = make_trainer(Net(), epochs=MANY, run_id="dropped", journal=True, checkpoints=True).start()
    del run
    gc.collect()
    wait_until(lambda: not trainer_threads(), "the run has not ended")
    (end,) = [event for event in read_journal("runs/dropped") if isinstance(event, RunEnded)]
    assert (end.status, end.reason) == ("stopped", "nothing refers to it any more")
    assert list(Path("runs/dropped/checkpoints").glob("step-*"))
    assert "run dropped is stopped, because nothing refers to it any more; keep what start() returns" in caplog.messages


def test_the_end_of_the_program_stops_a_started_run_with_a_checkpoint(script: Start, tmp_path: Path) -> None:
    started = script(
        "from support.training import Net, make_trainer\n"
        f"run = make_trainer(Net(), epochs={MANY}, run_id='left', journal=True, checkpoints=True).start()\n"
    )
    code, _, err = started.end()
    assert (code, err) == (0, "")
    assert list((tmp_path / "runs" / "left" / "checkpoints").glob("step-*"))
    (end,) = [event for event in read_journal(tmp_path / "runs" / "left") if isinstance(event, RunEnded)]
    assert (end.status, end.reason) == ("stopped", "the program ends")
