"""A run in a notebook's cell: its display, its result, its end by an interrupt or an error, in a real kernel."""

from __future__ import annotations

from typing import Any

import pytest
from notebook.kit import Kernel, Ran, Shown

pytestmark = pytest.mark.filterwarnings("ignore:zmq.eventloop.ioloop:DeprecationWarning")


def steps_of(document: dict[str, Any], messages: list[dict[str, Any]]) -> list[int]:
    """The steps of the training loss that a page has."""
    steps = list(document["runs"][0]["series"]["train_loss"]["step"])
    for message in messages:
        if message["type"] == "snapshot":
            steps = list(message["series"]["train_loss"]["step"])
        else:
            steps += message.get("points", {}).get("train_loss", ([], []))[0]
    return steps


def test_a_cell_shows_the_live_page_of_its_run_and_keeps_its_end(kernel: Kernel) -> None:
    """Text and a bar until the first step, then the page; each step reaches it once; a card and the whole run stay."""

    def release(ran: Ran) -> None:
        shown = Shown(kernel, ran) if len(ran.displays) == 2 else None
        if shown is not None and shown.documents:
            last = steps_of(shown.documents[0], shown.messages)[-1]
            (kernel.folder / f"saw-{last}").touch()

    arguments = "TrainerArguments(epochs=3, train_batch_size=4)"
    module = "Net(act=lambda step: step % 2 or step > 6 or hold_at(step, f'saw-{step - 1}')(step))"
    ran = kernel.run(f"trainer = Trainer({module}, {arguments}, run_id='cell')\ntrainer.train()", release)
    assert ran.streams == ""
    shown = Shown(kernel, ran)
    live, end = shown.documents
    assert live["notebook"]["live"]
    assert not end["notebook"]["live"]
    assert live["runs"][0]["run"]["status"] == "running"
    assert steps_of(live, []) == [1]
    assert steps_of(live, shown.messages)[:5] == [1, 2, 3, 4, 5]
    assert sorted(set(steps_of(live, shown.messages))) == steps_of(live, shown.messages)
    (fifth,) = {
        one["text/html"].split("</progress>")[0] for one in shown.progress if "2/3  step 1/4" in one["text/plain"]
    }
    assert 'value="0.4167"' in fifth
    assert steps_of(end, []) == list(range(1, 13))
    assert end["runs"][0]["run"]["status"] == "finished"
    assert "✓ finished" in shown.now
    result = ran.result
    assert result["text/plain"].startswith("RunResult(run_id='cell', status='finished', global_step=12, epochs=3,")
    assert len(result["text/plain"]) < 400
    assert "val_loss" in result["text/html"]
    assert str(kernel.folder / "runs" / "cell" / "checkpoints" / "step-12.a1") in result["text/html"]


def test_an_interrupted_cell_stops_its_run_with_a_checkpoint(kernel: Kernel) -> None:
    """As Ctrl-C elsewhere; the output is one line, and `RunInterrupted` has the result."""

    def interrupt(ran: Ran) -> None:
        if len(ran.displays) == 2 and Shown(kernel, ran).documents and ran not in interrupted:
            interrupted.append(ran)
            kernel.interrupt()

    interrupted: list[Ran] = []
    ran = kernel.run("Trainer(Net(), long, run_id='interrupted').train()", interrupt, fails=True)
    assert ran.traceback.startswith("RunInterrupted: SIGINT arrived: run interrupted stopped after global_step ")
    assert "its checkpoint is " in ran.traceback
    assert "\n" not in ran.traceback
    assert "■ stopped" in Shown(kernel, ran).now
    after = kernel.run("import sys, threading; error = sys.last_value\nprint(Path(error.result.checkpoint).is_dir())")
    assert after.streams == "True\n"
    threads = kernel.run("print([one.name for one in threading.enumerate() if 'stagecast' in one.name])")
    assert threads.streams == "[]\n"


def test_an_exception_in_a_step_shows_only_the_frames_of_the_user(kernel: Kernel) -> None:
    """The cell, and the step in it; not the loop between them."""
    cell = """
def broken_step(module, step, batch):
    return missing_name

Trainer(Net(train_step=broken_step), long, run_id="broken").train()
"""
    ran = kernel.run(cell, fails=True)
    assert "NameError: name 'missing_name' is not defined" in ran.traceback
    assert "in broken_step(module, step, batch)" in ran.traceback
    assert "loop.py" not in ran.traceback
    assert "trainer.py" not in ran.traceback
    assert len(ran.traceback.splitlines()) < 30
    assert "✗ failed" in Shown(kernel, ran).now


def test_a_block_in_a_cell_shows_its_run_in_the_loop_of_the_kernel(kernel: Kernel) -> None:
    """``async with trainer.run()`` shows what ``train()`` does; another run has displays of its own."""
    cell = """
few = TrainerArguments(epochs=1, train_batch_size=4)
async with Trainer(Net(), few, run_id="first").run() as first, Trainer(Net(), few, run_id="second").run() as second:
    pass
(await first.result()).status, (await second.result()).status
"""
    ran = kernel.run(cell)
    assert ran.result["text/plain"] == "('finished', 'finished')"
    assert len(ran.displays) == 4
    ends = [kernel.displays[name][-1]["text/html"] for name in ran.displays[::2]]
    assert "<b>first</b>" in ends[0]
    assert "<b>second</b>" in ends[1]


def test_a_resumed_run_shows_each_step_of_its_attempts_once(kernel: Kernel) -> None:
    """Steps that the second attempt repeats are those of the second one."""
    cell = """
def train(epochs, **more):
    arguments = TrainerArguments(epochs=epochs, train_batch_size=4)
    checkpoints = Checkpoints(every_steps=6, at_end=False)
    return Trainer(Net(), arguments, run_id="resumed", checkpoints=checkpoints, **more).train()
train(2)
train(3, resume="auto")
"""
    ran = kernel.run(cell)
    end = Shown(kernel, ran).documents[-1]
    assert steps_of(end, []) == list(range(1, 13))
    assert end["runs"][0]["run"]["attempt"] == 2


def test_the_console_prints_lines_where_it_is_told_to(kernel: Kernel) -> None:
    """With ``force_terminal=False`` it prints lines, and with ``sinks=[]`` nothing is shown."""
    few = "TrainerArguments(epochs=1, train_batch_size=4)"
    lines = "from sinks import Console\nlines = Console(force_terminal=False)"
    ran = kernel.run(f"{lines}\nTrainer(Net(), {few}, sinks=[lines]).train();")
    assert "epoch 1/1" in ran.streams
    assert ran.displays == []
    assert kernel.run(f"Trainer(Net(), {few}, sinks=[]).train();").displays == []


def test_a_run_is_opened_in_one_cell_and_closed_in_another(kernel: Kernel) -> None:
    """It trains, and its display moves, while no cell runs, and while a cell blocks the event loop of the kernel."""
    opened = kernel.run("run = Trainer(Net(), long, run_id='opened').start()")
    shown = Shown(kernel, opened)
    kernel.read_until(lambda: len(shown.messages) > 1)
    before = len(shown.messages)

    def release(ran: Ran) -> None:
        if len(shown.messages) > before + 1:
            (kernel.folder / "released").touch()

    kernel.run("wait_until(Path('released').exists)", release)
    closed = kernel.run("Path(await run.checkpoint()).is_dir()")
    assert closed.result["text/plain"] == "True"
    closed = kernel.run("run.stop('enough')\n(await run.result()).reason")
    assert closed.result["text/plain"] == "'enough'"
    kernel.read_until(lambda: "■ stopped" in shown.now)
    assert closed.displays == []


def test_a_cell_that_is_run_again_stops_the_run_that_it_has_started(kernel: Kernel) -> None:
    """Only the second run remains, and after its end no thread of either."""
    cell = "again = Trainer(Net(), long).start()"
    first = Shown(kernel, kernel.run(cell))
    second = Shown(kernel, kernel.run(cell))
    kernel.read_until(lambda: "■ stopped" in first.now and len(second.messages) > 1)
    kernel.run("again.stop()\nawait again.result()")
    kernel.run("from support.threads import trainer_threads\nwait_until(lambda: not trainer_threads())")


def test_commands_of_the_page_reach_a_run_until_it_has_ended(kernel: Kernel) -> None:
    """An invalid command is refused with the reason, and so is one for a run that is over."""
    shown = Shown(kernel, kernel.run("commanded = Trainer(Net(), long, run_id='commanded').start()"))
    kernel.read_until(lambda: shown.documents)
    assert shown.documents[0]["runs"][0]["run"]["commands"]
    assert shown.documents[0]["notebook"]["kernel"] == "of-the-test"
    refused = kernel.command(shown.id, "explode")
    assert refused["type"] == "refused"
    assert "not a command" in refused["reason"]
    assert kernel.command(shown.id, "stop") == {"type": "sent"}
    assert kernel.run("(await commanded.result()).status").result["text/plain"] == "'stopped'"
    kernel.read_until(lambda: "■ stopped" in shown.now)
    assert kernel.command(shown.id, "pause") == {"type": "refused", "reason": "the run has ended"}
