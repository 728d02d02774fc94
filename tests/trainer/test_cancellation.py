"""Every way to cancel a run: its loop has ended when the cancellation propagates.

After each of them no thread trains any more, the journal ends with ``RunEnded(cancelled)``, and the run's folder is
free.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from support.scripts import Start
from support.threads import WAIT_S, join_threads, trainer_threads, wait_until_failed
from support.training import Boom, Net, make_trainer, read_journal

from events.errors import RunCancelled, TrainingThreadStuck
from events.messages import RunEnded
from events.run.folder import RunFolder
from trainer import CallbackInterface, Delivery, fenced

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Case:
    """A run to cancel, which counts its steps."""

    def __init__(self, folder: Path, *, callbacks: Any = (), **options: Any) -> None:
        self.folder, self.steps = folder, 0
        self.stepping = threading.Event()
        self.hold: Any = None
        self.run: Any = None
        options = {"epochs": 1_000_000, "journal": True, "run_id": "case", "run_dir": folder} | options
        self.trainer = make_trainer(Net(act=self.step), callbacks=callbacks, **options)

    def step(self, global_step: int) -> None:
        self.steps += 1
        if self.steps > 2 or self.hold is not None:
            self.stepping.set()
        if self.hold is not None:
            self.hold.wait(WAIT_S)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Any]:
        """Enter a run and wait for its first steps."""
        async with self.trainer.run() as self.run:
            await anyio.to_thread.run_sync(self.stepping.wait, WAIT_S)
            yield self.run

    async def check(self, status: str = "cancelled") -> None:
        """Check that the run has ended cleanly."""
        assert trainer_threads(loops=True) == []
        steps = self.steps
        journal = read_journal(self.folder)
        assert [event.status for event in journal if isinstance(event, RunEnded)] == [status]
        assert [event.seq for event in journal] == list(range(1, len(journal) + 1))
        RunFolder.open(self.folder, "case").close()
        if status == "cancelled":
            with pytest.raises(RunCancelled):
                await self.run.result()
        assert self.steps == steps


@pytest.fixture
def case(tmp_path: Path) -> Any:
    return Case(tmp_path / "run")


# ------------------------------------------------------------------------------------- scopes of anyio and trio


async def test_move_on_after_ends_the_run_at_its_next_step(case: Any) -> None:
    with anyio.move_on_after(WAIT_S) as scope:
        async with case.running():
            scope.deadline = anyio.current_time()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    await case.check()


async def test_fail_after_raises_its_timeout(case: Any) -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(WAIT_S) as scope:
            async with case.running() as run:
                scope.deadline = anyio.current_time()
                await run.result()
    await case.check()


async def test_cancelled_while_leaving_the_block(case: Any) -> None:
    async with anyio.create_task_group() as tasks:

        async def hold() -> None:
            with scope:
                async with case.running():
                    leaving.set()

        scope, leaving = anyio.CancelScope(), anyio.Event()
        tasks.start_soon(hold)
        await leaving.wait()
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
    assert scope.cancelled_caught
    await case.check()


@asyncio_only
async def test_cancelled_while_leaving_the_block_because_of_an_error(case: Any) -> None:
    case.hold = threading.Event()
    leaving = anyio.Event()

    async def hold() -> None:
        async with case.running():
            leaving.set()
            raise Boom

    task = asyncio.create_task(hold())
    await leaving.wait()
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    await anyio.wait_all_tasks_blocked()
    case.hold.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    context: BaseException | None = caught.value
    while context is not None and not isinstance(context, Boom):
        context = context.__context__
    assert isinstance(context, Boom)
    await case.check()


async def test_cancelled_while_waiting_for_the_result_elsewhere(case: Any) -> None:
    async with case.running() as run:
        with anyio.move_on_after(0) as scope:
            await run.result()
        assert scope.cancelled_caught
        assert trainer_threads(loops=True) != []
        run.stop()
    await case.check("stopped")


async def test_a_scope_that_was_cancelled_before_the_block_was_entered(case: Any) -> None:
    case.stepping.set()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with case.trainer.run() as case.run:
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    await case.check()


async def test_a_task_group_whose_other_task_fails(case: Any) -> None:
    async def fail() -> None:
        await started.wait()
        raise Boom

    started = anyio.Event()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            async with case.running():
                started.set()
                await anyio.sleep_forever()
    assert [type(error) for error in caught.value.exceptions] == [Boom]
    await case.check()


async def test_scopes_inside_and_around_the_block_do_not_mix(case: Any) -> None:
    async with case.running() as run:
        for _ in range(3):
            with anyio.move_on_after(0):
                await anyio.sleep_forever()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            tasks.cancel_scope.cancel()
        run.stop()
    await case.check("stopped")


# ------------------------------------------------------------------------------------------ asyncio's own ways


@asyncio_only
@pytest.mark.parametrize("where", ["in the body", "while leaving", "in result()", "in events()"])
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_task_cancel_however_often(case: Any, where: str, times: int) -> None:
    """A native cancellation cuts through shields and may be repeated."""

    async def hold() -> None:
        async with case.running() as run:
            inside.set()
            if where == "in the body":
                await asyncio.sleep(60)
            elif where == "in result()":
                await run.result()
            elif where == "in events()":
                async for _ in run.events(types=[RunEnded]):
                    pass

    inside = asyncio.Event()
    case.hold = threading.Event()
    task = asyncio.create_task(hold())
    await inside.wait()
    for _ in range(times):
        await anyio.wait_all_tasks_blocked()
        task.cancel()
    await anyio.wait_all_tasks_blocked()
    assert not task.done(), "a step is under way: the task waits for it"
    case.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await case.check()


@asyncio_only
async def test_asyncio_timeout(case: Any) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            async with case.running():
                timeout.reschedule(asyncio.get_running_loop().time())
                await asyncio.sleep(60)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    await case.check()


@asyncio_only
async def test_asyncio_wait_for(case: Any) -> None:
    async def hold() -> None:
        async with case.running():
            await asyncio.sleep(60)

    task = asyncio.create_task(hold())
    await asyncio.to_thread(case.stepping.wait, WAIT_S)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task, 0)
    await case.check()


@asyncio_only
async def test_an_asyncio_task_group_whose_other_task_fails(case: Any) -> None:
    async def fail() -> None:
        await started.wait()
        raise Boom

    started = asyncio.Event()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            async with case.running():
                started.set()
                await asyncio.sleep(60)
    assert [type(error) for error in caught.value.exceptions] == [Boom]
    await case.check()


@asyncio_only
async def test_cancelling_all_tasks_ends_the_run(case: Any) -> None:
    """As asyncio.run does, the run's own tasks included; the journal is closed."""

    async def hold() -> None:
        async with case.running():
            inside.set()
            await asyncio.sleep(60)

    inside = asyncio.Event()
    before = asyncio.all_tasks()
    task = asyncio.create_task(hold())
    await inside.wait()
    ours = asyncio.all_tasks() - before
    for one in ours:
        one.cancel()
    await asyncio.wait(ours, timeout=WAIT_S)
    assert task.cancelled()
    assert all(one.done() for one in ours)
    await case.check()


@asyncio_only
async def test_asyncio_run_ends_a_run_in_a_background_task(script: Start) -> None:
    program = script(BACKGROUND)
    code, out, err = await anyio.to_thread.run_sync(program.end)
    assert (code, out.split(), err) == (0, ["cancelled", "0"], "")


@asyncio_only
async def test_a_process_that_ends_with_a_run_in_it_has_its_own_exit_code(script: Start) -> None:
    """A loop that is inside torch when the interpreter ends would abort the process."""
    held = (
        BACKGROUND[: BACKGROUND.index("async def hold")]
        + """
import sys
async def main():
    await trainer.run().__aenter__()
    await asyncio.to_thread(stepping.wait)
    sys.exit(7)
asyncio.run(main())
"""
    )
    code, _, err = await anyio.to_thread.run_sync(script(held).end)
    assert code == 7, err
    assert "terminate" not in err


BACKGROUND = """
import asyncio, threading
from support.training import Net, make_trainer, read_journal

stepping = threading.Event()
trainer = make_trainer(Net(act=lambda step: stepping.set()), epochs=10**6, journal=True, run_dir="run")

async def hold():
    async with trainer.run():
        await asyncio.sleep(60)

async def main():
    global task
    task = asyncio.create_task(hold())
    await asyncio.to_thread(stepping.wait)

asyncio.run(main())
print(read_journal("run")[-1].status)
print(sum(thread.name.startswith("stagecast-loop") for thread in threading.enumerate()))
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_ctrl_c_in_a_program_with_an_event_loop(script: Start, backend: str) -> None:
    """The event loop turns the signal into a cancellation, then into KeyboardInterrupt."""
    interrupted = (
        BACKGROUND[: BACKGROUND.index("async def main")]
        + f"""
import anyio
async def report():
    await anyio.to_thread.run_sync(stepping.wait)
    print("training")
async def main():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(report)
        async with trainer.run():
            await anyio.sleep(60)
try:
    anyio.run(main, backend={backend!r})
except BaseException as error:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    print(type(error).__name__)
"""
        + BACKGROUND[BACKGROUND.index("print(read_journal") :]
    )
    program = script(interrupted)
    await anyio.to_thread.run_sync(program.wait_for, "training")
    program.signal(signal.SIGINT)
    code, out, err = await anyio.to_thread.run_sync(program.end)
    assert (code, out.split(), err) == (0, ["KeyboardInterrupt", "cancelled", "0"], "")


# -------------------------------------------------------------------------------------- what holds up the end


async def test_cancelled_while_a_fenced_hook_holds_the_loop(tmp_path: Path) -> None:
    """The loop stops waiting for the hook, which still runs."""
    held, free = threading.Event(), threading.Event()

    class Slow(CallbackInterface):
        @fenced
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            held.set()
            free.wait(WAIT_S)

    case = Case(tmp_path / "run", callbacks=[Slow()], drain_timeout_s=0.5)
    with anyio.CancelScope() as scope:
        async with case.trainer.run() as case.run:
            await anyio.to_thread.run_sync(held.wait, WAIT_S)
            scope.cancel()
            await anyio.sleep_forever()
    assert not free.is_set()
    free.set()
    await case.check()


async def test_cancelled_while_an_observer_holds_the_loop(tmp_path: Path) -> None:
    """The loop stops waiting for room in the queue."""
    held, free = threading.Event(), threading.Event()

    class Slow(CallbackInterface):
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            held.set()
            free.wait(WAIT_S)

    delivery = Delivery(overflow="block", capacity=4, on_error="fatal", latency_s=0.001)
    case = Case(tmp_path / "run", callbacks=[(Slow(), delivery)], drain_timeout_s=0.5)
    with anyio.CancelScope() as scope:
        async with case.trainer.run() as case.run:
            await anyio.to_thread.run_sync(held.wait, WAIT_S)
            while not case.run._connection._session.ring.gated:
                await anyio.lowlevel.checkpoint()  # nothing tells: a wait is announced after five seconds only
            scope.cancel()
            await anyio.sleep_forever()
    free.set()
    await case.check()


async def test_a_step_that_hangs_is_named_with_its_stack(tmp_path: Path) -> None:
    case = Case(tmp_path / "run", stop_grace_s=0.05)
    case.hold = threading.Event()
    with pytest.raises(TrainingThreadStuck) as caught:
        async with case.running():
            raise Boom
    message = str(caught.value)
    assert "within 0.05 s (stop_grace_s)" in message
    assert "it is in train_step" in message
    assert "self.hold.wait(WAIT_S)" in message
    assert isinstance(caught.value.__cause__, Boom)
    journal = read_journal(tmp_path / "run")
    assert (type(journal[-1]), journal[-1].status) == (RunEnded, "cancelled")
    RunFolder.open(tmp_path / "run", "case").close()
    with pytest.raises(TrainingThreadStuck):
        await case.run.result()
    case.hold.set()
    join_threads()
    assert case.steps == 1, "when the step returns after all, no other follows"


async def test_cancelling_while_observers_drain_keeps_the_result(tmp_path: Path) -> None:
    """The loop has finished; the cancellation propagates all the same."""
    ended, free = threading.Event(), threading.Event()

    class Last(CallbackInterface):
        def on_end_train(self, global_step: int) -> None:
            ended.set()
            free.wait(WAIT_S)

    trainer = make_trainer(Net(), callbacks=[Last()])
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await anyio.to_thread.run_sync(ended.wait, WAIT_S)
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.wait_all_tasks_blocked()
                free.set()

            tasks.start_soon(cancel)
            async with trainer.run() as run:
                pass
    assert scope.cancelled_caught
    assert (await run.result()).status == "finished"


async def test_steps_stop_at_once(case: Any) -> None:
    with anyio.CancelScope() as scope:
        async with case.running():
            case.hold = SimpleNamespace(wait=lambda timeout: wait_until_failed(case.run))
            case.stepping.clear()
            await anyio.to_thread.run_sync(case.stepping.wait, WAIT_S)
            at = case.steps
            scope.cancel()
            await anyio.sleep_forever()
    assert case.steps == at
    await case.check()


async def test_ctrl_c_while_the_block_waits_for_the_end(script: Start, anyio_backend: str) -> None:
    """trio raises it inside the wait for the loop, which absorbs it until the run has ended."""
    program = script(
        BACKGROUND[: BACKGROUND.index("async def hold")]
        + f"""
import anyio
def tell():
    stepping.wait()
    print("training")
threading.Thread(target=tell).start()
async def main():
    async with trainer.run():
        pass
try:
    anyio.run(main, backend={anyio_backend!r})
except BaseException as error:
    print(type(error).__name__)
"""
        + BACKGROUND[BACKGROUND.index("print(read_journal") :]
    )
    await anyio.to_thread.run_sync(program.wait_for, "training")
    program.signal(signal.SIGINT)
    code, out, err = await anyio.to_thread.run_sync(program.end)
    assert (code, out.split(), err) == (0, ["KeyboardInterrupt", "cancelled", "0"], "")
