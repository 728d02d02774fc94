"""The doors to a run: `train` on any thread and within other programs, `run` inside an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from support.threads import WAIT_S, join_threads, trainer_threads
from support.training import Boom, Diary, Net, failing, make_trainer, read_journal, train

from events.errors import CursorError, RunCancelled, RunFolderHeld
from events.messages import CommandTaken, Event, RunEnded, RunStarted, TrainEpochEnded, TrainStepEnded
from trainer import CallbackInterface, inline, observer
from trainer.errors import ContractError

MANY = 100_000  # epochs: more than any test waits for


# ------------------------------------------------------------------------------------------------------- train()


def test_train_raises_the_users_own_exception_with_a_note() -> None:
    error = Boom("mine")
    with pytest.raises(Boom) as caught:
        make_trainer(failing(error)).train()
    assert caught.value is error
    assert error.__cause__ is None
    assert error.__notes__ == ["stagecast: in train_step after global_step 1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Boom("mine")], ids=["ctrl-c", "exit", "error"])
@pytest.mark.parametrize("lane", [inline, observer])
@pytest.mark.parametrize(
    "hook", ["on_begin_train_epoch", "on_end_train_step", "on_end_val_epoch", "on_end_train_epoch", "on_end_train"]
)
def test_an_exception_means_the_same_in_every_hook(hook: str, lane: Any, error: BaseException) -> None:
    """Also during the final drain: the last RunEnded counts."""

    def fail(self: Any, global_step: int, *args: Any, **kwargs: Any) -> None:
        raise error

    outcome = train(Net(), callbacks=[type("Fails", (CallbackInterface,), {hook: lane(fail)})()])
    assert outcome.error is error
    status = "failed" if isinstance(error, Exception) else "cancelled"
    assert outcome.of(RunEnded)[-1].status == status


def test_a_trainer_trains_again_after_a_failure() -> None:
    net = failing(Boom(), at=3)
    trainer = make_trainer(net, epochs=2)
    with pytest.raises(Boom):
        trainer.train()
    assert "_stagecast_recorder" not in vars(net)
    assert net.training
    with pytest.raises(Boom):
        trainer.train()
    join_threads()


@pytest.mark.parametrize("hangs", ["in a thread", "in the event loop"])
def test_an_async_sink_that_hangs_does_not_hold_the_end(hangs: str) -> None:
    """Closing the event loop waits neither for its executor nor for tasks that ignore their cancellation."""
    released = threading.Event()

    class Writer:
        async def write(self, events: Any) -> None:
            if hangs == "in a thread":
                await asyncio.to_thread(released.wait, 100)  # longer than a test may take
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

        async def close(self) -> None: ...

    class Hangs:
        def open(self, run: Any) -> Any:
            return Writer()

    result = make_trainer(Net(), sinks=[Hangs()], drain_timeout_s=0.05).train()
    assert not released.is_set()
    assert (result.status, result.observers[-1].state) == ("finished", "stuck")
    released.set()
    join_threads()


def test_train_twice_is_two_runs() -> None:
    net = Net()
    trainer = make_trainer(net)
    first, second = trainer.train(), trainer.train()
    assert first.run_id != second.run_id
    assert first.global_step == second.global_step == 2
    assert second.metrics["train_loss"] < first.metrics["train_loss"]


def test_train_runs_the_loop_on_the_calling_thread() -> None:
    threads = set()

    def net() -> Net:
        return Net(act=lambda step: threads.add(threading.get_ident()))

    def elsewhere() -> None:
        train(net())
        seen.append((threads.copy(), threading.get_ident()))

    seen: list[Any] = []
    train(net())
    assert threads == {threading.get_ident()}
    threads.clear()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(WAIT_S)
    assert seen[0][0] == {seen[0][1]}


@pytest.mark.anyio
async def test_train_works_inside_a_running_event_loop() -> None:
    diary = Diary()
    outcome = train(Net(), callbacks=[diary], epochs=2)
    assert outcome.result.status == "finished"
    assert diary.names[-1] == "on_end_train"
    await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_train_works_in_a_worker_thread_of_an_event_loop() -> None:
    outcome = await anyio.to_thread.run_sync(train, Net())
    assert outcome.result.status == "finished"


def test_runs_in_two_threads_are_independent() -> None:
    together = threading.Barrier(2, timeout=WAIT_S)

    def run() -> None:
        outcomes.append(train(Net(act=lambda step: together.wait()), epochs=3))

    outcomes: list[Any] = []
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert {e.run_id for e in outcome.events} == {outcome.result.run_id}
        assert [e.seq for e in outcome.events] == list(range(1, len(outcome.events) + 1))
        assert [e.global_step for e in outcome.of(TrainStepEnded)] == list(range(1, 7))
    assert outcomes[0].result.run_id != outcomes[1].result.run_id


def test_nothing_is_left_behind_by_fifty_runs() -> None:
    train(Net())
    join_threads()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        net = failing(Boom()) if number % 5 == 4 else Net(rows=8)
        train(net, callbacks=[Diary()], journal=number % 10 == 0)
    join_threads()
    assert len(os.listdir("/proc/self/fd")) <= before


# --------------------------------------------------------------------------------------------------------- run()


@pytest.mark.anyio
async def test_the_end_of_the_block_waits_for_the_end_of_the_run() -> None:
    async with make_trainer(Net(), epochs=3).run() as run:
        pass
    result = await run.result()
    assert (result.status, result.global_step, result.epochs) == ("finished", 6, 3)
    assert await run.result() is result
    assert trainer_threads(loops=True) == []


@pytest.mark.anyio
async def test_result_inside_the_block_waits() -> None:
    async with make_trainer(Net()).run() as run, anyio.create_task_group() as tasks:
        results = []

        async def wait() -> None:
            results.append(await run.result())

        tasks.start_soon(wait)
        tasks.start_soon(wait)
        assert (await run.result()).global_step == 2
    assert len(results) == 2


@pytest.mark.anyio
async def test_the_loop_has_a_thread_of_its_own() -> None:
    threads: set[str] = set()

    net = Net(act=lambda step: threads.add(threading.current_thread().name))

    async with make_trainer(net).run() as run:
        pass
    assert threads == {f"stagecast-loop-{run.run_id}"}


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["end of the block", "inside", "afterwards"])
async def test_the_users_exception_propagates_unchanged(where: str) -> None:
    error = Boom("mine")
    trainer = make_trainer(failing(error))
    async with anyio.create_task_group():
        with pytest.raises(Boom) as caught:
            async with trainer.run() as run, anyio.create_task_group():
                pass
        if where == "inside":
            with pytest.raises(Boom) as caught:
                async with trainer.run() as run:
                    await run.result()
        if where == "afterwards":
            with pytest.raises(Boom) as caught:
                await run.result()
    assert caught.value is error
    assert trainer_threads(loops=True) == []


@pytest.mark.anyio
async def test_an_exception_in_the_block_cancels_the_run_and_propagates() -> None:
    error = Boom("the host's")
    with pytest.raises(Boom) as caught:
        async with make_trainer(Net(), epochs=MANY, journal=True).run() as run:
            async for event in run.events(types=[TrainStepEnded]):
                if event.global_step > 3:
                    raise error
    assert caught.value is error
    assert trainer_threads(loops=True) == []
    with pytest.raises(RunCancelled, match="an exception left the block"):
        await run.result()
    journal = read_journal(f"runs/{run.run_id}")
    assert journal[-1].status == "cancelled"


@pytest.mark.anyio
async def test_events_from_the_start_are_all_there_in_order() -> None:
    async with make_trainer(Net(), epochs=2, journal=True).run() as run:
        await run.result()
        late = [event async for event in run.events(since=0)]
    after = [event async for event in run.events(since=0)]
    assert [e.seq for e in late] == list(range(1, len(late) + 1))
    assert type(late[0]) is RunStarted
    assert type(late[-1]) is RunEnded
    assert [e.seq for e in after] == [e.seq for e in late]


@pytest.mark.anyio
async def test_an_invalid_cursor_or_type_is_refused_at_once() -> None:
    async with make_trainer(Net()).run() as run:
        for since in (-1, 1.5, "0", True):
            with pytest.raises(CursorError, match=f"since={since!r}: give the seq of an event"):
                run.events(since=since)
        for types in (TrainEpochEnded, [int], "TrainEpochEnded", [TrainEpochEnded, "RunEnded"], 3):
            with pytest.raises(TypeError, match=r"give a list of event types, such as \[TrainEpochEnded\]"):
                run.events(types=types)  # type: ignore[arg-type]
        named = (kind for kind in [TrainEpochEnded])  # any iterable will do
        assert [type(event) async for event in run.events(since=0, types=named)] == [TrainEpochEnded]
    assert (await run.result()).status == "finished"


@pytest.mark.anyio
async def test_events_of_some_types_without_a_journal() -> None:
    async with make_trainer(Net(), epochs=2).run() as run:
        stream = run.events(since=0, types=[TrainEpochEnded])
        epochs = [event async for event in stream]
    assert [e.epoch for e in epochs] == [0, 1]
    assert stream.cursor >= epochs[-1].seq


@pytest.mark.anyio
async def test_stop_is_orderly() -> None:
    diary = Diary()
    async with make_trainer(Net(), epochs=MANY, callbacks=[diary]).run() as run:
        async for event in run.events(types=[TrainStepEnded]):
            if event.global_step >= 3:
                run.stop("enough")
                break
    result = await run.result()
    assert (result.status, result.reason) == ("stopped", "enough")
    assert diary.lines[-1] == ("on_end_train", result.global_step, None)


@pytest.mark.anyio
async def test_commands_may_come_from_other_threads() -> None:
    """Each command is published when it is taken."""
    taken: list[str] = []
    async with make_trainer(Net(), epochs=MANY, journal=True).run() as run:
        stream = run.events(since=0, types=[CommandTaken])

        async def send(command: Any) -> CommandTaken:
            await anyio.to_thread.run_sync(command, "why")
            event: CommandTaken = await anext(stream)
            taken.append(event.command)
            return event

        paused = await send(run.pause)
        resumed = await send(run.resume)
        assert resumed.global_step == paused.global_step
        assert resumed.reason == "why"
        await send(run.pause)
        await send(run.stop)
    result = await run.result()
    assert taken == ["pause", "resume", "pause", "stop"]
    assert result.status == "stopped"


@pytest.mark.anyio
async def test_a_stop_wins_over_other_commands_at_the_same_boundary() -> None:
    def act(step: int) -> None:
        assert step > 1 or sent.wait(WAIT_S)

    sent = threading.Event()
    async with make_trainer(Net(act=act), epochs=MANY).run() as run:
        run.pause()
        run.stop("first")
        run.stop("second")
        run.resume()
        sent.set()
        commands = [event.command async for event in run.events(since=0, types=[CommandTaken])]
    result = await run.result()
    assert commands == ["pause", "stop", "stop", "resume"]
    assert (result.status, result.reason) == ("stopped", "first")
    assert result.global_step <= 1


@pytest.mark.anyio
async def test_a_command_after_the_end_is_harmless() -> None:
    """The sender cannot know that the run has just ended."""
    async with make_trainer(Net()).run() as run:
        await run.result()
        run.stop()
        run.pause()
    run.stop()
    assert (await run.result()).status == "finished"


@pytest.mark.anyio
async def test_two_runs_side_by_side_in_one_event_loop() -> None:
    together = threading.Barrier(2, timeout=WAIT_S)

    first, second = (make_trainer(Net(act=lambda step: together.wait()), epochs=2).run() for _ in range(2))
    async with first as one, second as two:
        events: list[Event] = [event async for event in one.events(since=0)]
    assert {event.run_id for event in events} == {one.run_id}
    assert (await one.result()).global_step == (await two.result()).global_step == 4


@pytest.mark.anyio
async def test_one_module_cannot_be_in_two_runs() -> None:
    """The second run fails; the first continues."""
    net = Net()
    async with make_trainer(net, epochs=MANY).run() as first:
        await anext(first.events(types=[TrainStepEnded]))
        with pytest.raises(ContractError, match="is being trained by another run"):
            async with make_trainer(net).run():
                pass
        stream = first.events()
        async for event in stream:
            if type(event) is TrainStepEnded:
                break
        await stream.aclose()
        first.stop()
    assert (await first.result()).status == "stopped"


@pytest.mark.anyio
async def test_a_folder_in_use_is_refused_before_anything_starts() -> None:
    async with make_trainer(Net(), epochs=MANY, journal=True, run_id="mine").run() as run:
        with pytest.raises(RunFolderHeld, match="'mine'"):
            async with make_trainer(Net(), journal=True, run_id="mine").run():
                raise AssertionError("must not be entered")
        assert len(trainer_threads(loops=True)) == 1
        run.stop()


@pytest.mark.anyio
async def test_leaving_an_async_generator_that_holds_a_run_ends_the_run() -> None:
    """GeneratorExit is an exception in the block like any other."""

    async def steps() -> Any:
        async with make_trainer(Net(), epochs=MANY).run() as run:
            async for event in run.events(types=[TrainStepEnded]):
                yield event.global_step

    generator = steps()
    async for step in generator:
        if step > 2:
            break
    await generator.aclose()
    assert trainer_threads(loops=True) == []


@pytest.mark.anyio
async def test_a_run_does_not_change_the_hosts_settings() -> None:
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    async with make_trainer(Net()).run():
        pass
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == before


@pytest.mark.anyio
async def test_a_module_is_claimed_before_anything_slow_is_done_with_it() -> None:
    refused = threading.Event()

    class Own(Net):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            assert refused.wait(WAIT_S)  # the first one continues when the second has failed
            return super().to(*args, **kwargs)

    net = Own()
    outcomes: list[str] = []

    async def one() -> None:
        try:
            async with make_trainer(net).run() as run:
                pass
            outcomes.append((await run.result()).status)
        except ContractError as error:
            outcomes.append(str(error).partition(";")[0])
            refused.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one)
        tasks.start_soon(one)
    assert outcomes == ["this Own is being trained by another run", "finished"]


def test_the_ledger_may_be_published_only_at_the_end() -> None:
    assert train(Net(), ledger_interval_s=float("inf")).result.status == "finished"
