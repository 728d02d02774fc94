"""The small parts between threads and the event loop: waking it, calls on threads and in tasks, fences."""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.bus.cpu_time import CpuTime
from events.bus.fence import Fence
from events.bus.wakeup import Wakeup
from events.bus.worker import AsyncJob, Worker

LIMIT_S = 20.0
"""No test waits that long: it fails instead."""

pytestmark = pytest.mark.both_event_loops


@pytest.fixture
def wakeup() -> Any:
    wakeup = Wakeup()
    yield wakeup
    wakeup.close()


# ------------------------------------------------------------------------------------------------- wakeup


@pytest.mark.anyio
async def test_a_wake_up_between_two_waits_is_not_lost(wakeup: Wakeup) -> None:
    """Set while nobody waits, once or many times: the next wait returns at once, the one after it waits again."""
    with anyio.fail_after(LIMIT_S):
        for times in (1, 2, 10_000):
            for _ in range(times):
                wakeup.set()
            await wakeup.wait(None)
            with anyio.move_on_after(0.001) as scope:
                await wakeup.wait(None)
            assert scope.cancelled_caught


@pytest.mark.anyio
async def test_a_wait_that_is_cancelled_or_times_out_loses_no_wake_up(wakeup: Wakeup) -> None:
    """Whatever ends a wait, what was announced meanwhile ends the next."""
    with anyio.fail_after(LIMIT_S):
        for _ in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await wakeup.wait(None)
            wakeup.set()
            with anyio.CancelScope() as scope:
                scope.cancel()
                await wakeup.wait(None)
            await wakeup.wait(None)
            await wakeup.wait(0)
            wakeup.set()
            await wakeup.wait(None)


@pytest.mark.anyio
async def test_every_wake_up_from_another_thread_arrives(wakeup: Wakeup) -> None:
    """Two threads wake it at any moment of the waiter's round; it always sees what each announced last."""
    rounds = 1_500
    announced = [0, 0]
    seen = [threading.Event(), threading.Event()]
    failed: list[int] = []

    def announce(place: int) -> None:
        for at in range(1, rounds + 1):
            seen[place].clear()
            announced[place] = at
            wakeup.set()
            if not seen[place].wait(LIMIT_S):
                failed.append(at)
                return

    threads = [threading.Thread(target=announce, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    answered = [0, 0]
    with anyio.move_on_after(LIMIT_S):
        while answered != [rounds, rounds]:
            await wakeup.wait(None)
            for place in (0, 1):
                if (at := announced[place]) > answered[place]:
                    answered[place] = at
                    seen[place].set()
    assert answered == [rounds, rounds]
    for thread in threads:
        thread.join(LIMIT_S)
    assert not failed


def test_waking_what_is_closed_does_nothing(wakeup: Wakeup) -> None:
    """An observer's thread may return long after the run."""
    wakeup.close()
    wakeup.set()
    wakeup.set()


# ------------------------------------------------------------------------------------------------- worker


@asynccontextmanager
async def working() -> AsyncIterator[Worker]:
    """A worker that reports to a real event loop."""
    wakeup = Wakeup()
    worker = Worker("worker-test", wakeup.post, CpuTime())
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wakeup.serve)
            yield worker
            worker.stop()
            for thread in threading.enumerate():
                if thread.name == worker.name:
                    thread.join(LIMIT_S)
            tasks.cancel_scope.cancel()


def thread_of(worker: Worker) -> threading.Thread:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == worker.name]
    return thread


def fail(error: BaseException) -> None:
    raise error


ERRORS = [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(4)]


@pytest.mark.anyio
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_what_a_call_raises_is_data(error: BaseException) -> None:
    """Nothing an observer raises ends its thread or the host's event loop, whatever its kind."""
    async with working() as worker:
        job = worker.submit(fail, error)
        await job.finished.wait()
        assert job.error is error
        assert job.value is None
        after = worker.submit(lambda: "still there")
        await after.finished.wait()
        assert (after.value, after.error) == ("still there", None)


@pytest.mark.anyio
async def test_calls_are_made_one_at_a_time_in_order_on_one_thread() -> None:
    """Whatever is queued; the thread is named, and daemonic so that it cannot keep a process alive."""
    async with working() as worker:
        assert worker.name not in {thread.name for thread in threading.enumerate()}
        running = threading.Lock()
        calls: list[tuple[int, threading.Thread]] = []

        def call(at: int) -> int:
            with_others = not running.acquire(blocking=False)
            assert not with_others
            calls.append((at, threading.current_thread()))
            running.release()
            return at

        jobs = [worker.submit(call, at) for at in range(50)]
        await jobs[-1].finished.wait()
        assert [job.value for job in jobs] == [at for at, _ in calls] == list(range(50))
        assert all(job.finished.is_set() for job in jobs)
        assert {thread for _, thread in calls} == {thread_of(worker)}
        assert thread_of(worker).daemon


@pytest.mark.anyio
async def test_stopping_lets_queued_calls_finish_and_makes_no_more() -> None:
    """The thread ends after what was queued before; stopping twice, or without a thread, is harmless."""
    async with working() as worker:
        begin = threading.Event()
        made: list[str] = []
        worker.submit(begin.wait, LIMIT_S)
        worker.submit(made.append, "queued")
        thread = thread_of(worker)
        worker.stop()
        worker.submit(made.append, "late")
        worker.stop()
        begin.set()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        assert made == ["queued"]
    Worker("never used", lambda function: None, CpuTime()).stop()


@pytest.mark.anyio
async def test_an_idle_worker_keeps_nothing_of_its_last_call() -> None:
    """Batches hold tensors: they are gone when the call has returned, not when the next one comes."""

    class Batch:
        pass

    async with working() as worker:
        batch = Batch()
        gone = weakref.ref(batch)
        job = worker.submit(lambda batch: None, batch)
        del batch
        await job.finished.wait()
        del job
        await worker.submit(int).finished.wait()  # it has gone round its loop since
        gc.collect()
        assert gone() is None


@pytest.mark.anyio
async def test_a_call_that_hangs_holds_up_nobody_else() -> None:
    """Only whoever waits for it waits; the event loop and other workers go on."""
    hang = threading.Event()
    async with working() as worker:
        stuck = worker.submit(hang.wait, LIMIT_S)
        stuck.cancel()  # does nothing: a thread cannot be interrupted
        other = Worker("another", worker.post, CpuTime())
        done = other.submit(lambda: 5)
        await done.finished.wait()
        assert done.value == 5
        assert not stuck.finished.is_set()
        other.stop()
        hang.set()
        await stuck.finished.wait()
        assert (stuck.value, stuck.error) == (True, None)


# ---------------------------------------------------------------------------------------------- async jobs


async def fail_later(error: BaseException) -> None:
    await anyio.lowlevel.checkpoint()
    raise error


@pytest.mark.anyio
@pytest.mark.parametrize("function", [fail, fail_later])
@pytest.mark.parametrize("error", ERRORS[:-1], ids=lambda error: type(error).__name__)
async def test_what_an_async_call_raises_is_data(function: Callable[..., Any], error: BaseException) -> None:
    """The same for a task, whether it raises before its first wait or after."""
    with anyio.fail_after(LIMIT_S):
        job = AsyncJob(function, error)
        await job.finished.wait()
    assert job.error is error


@pytest.mark.anyio
async def test_an_async_call_that_cancels_itself_ends_with_that_error() -> None:
    """A cancellation that nobody asked for is the observer's failure, not the run's end."""

    async def cancelled() -> None:
        raise anyio.get_cancelled_exc_class()

    if anyio.get_cancelled_exc_class().__module__.startswith("trio"):
        pytest.skip("trio's cancellation cannot be made by hand")
    with anyio.fail_after(LIMIT_S):
        job = AsyncJob(cancelled)
        await job.finished.wait()
    assert isinstance(job.error, anyio.get_cancelled_exc_class())


@pytest.mark.anyio
async def test_an_async_call_ends_when_asked_to_and_its_value_is_kept() -> None:
    """Cancelled early or late, it finishes; one that returns has its value and the caller's context."""
    place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")
    place.set("here")

    async def get(value: int) -> tuple[int, str]:
        await anyio.lowlevel.checkpoint()
        return value, place.get()

    with anyio.fail_after(LIMIT_S):
        job = AsyncJob(get, 7)
        await job.finished.wait()
        assert (job.value, job.error) == ((7, "here"), None)
        for rounds in range(3):
            job = AsyncJob(anyio.sleep_forever)
            for _ in range(rounds):
                await anyio.lowlevel.checkpoint()
            job.cancel()
            await job.finished.wait()
            assert isinstance(job.error, anyio.get_cancelled_exc_class())


@pytest.mark.anyio
async def test_an_async_call_that_shields_itself_can_be_left_behind() -> None:
    """No task group waits for it: whoever started it is cancelled and leaves, it goes on."""
    release = anyio.Event()

    async def stubborn() -> str:
        with anyio.CancelScope(shield=True):
            await release.wait()
        return "done"

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            job = AsyncJob(stubborn)
            await anyio.lowlevel.checkpoint()
            job.cancel()
            tasks.cancel_scope.cancel()
            await job.finished.wait()
        assert not job.finished.is_set()
        release.set()
        await job.finished.wait()
        assert job.value == "done"


# ------------------------------------------------------------------------------------------------- fences


@settings(deadline=None)
@given(
    observers=st.sets(st.sampled_from("abcd")),
    calls=st.lists(st.one_of(st.sampled_from("abcdx"), st.sets(st.sampled_from("abcdx"))), max_size=8),
)
def test_a_fence_stands_until_its_last_observer_is_released(observers: set[str], calls: list[Any]) -> None:
    """In any order, repeatedly, by name or by keeping others; strangers do not matter."""
    fence = Fence(observers)
    left = set(observers)
    for call in calls:
        assert fence.wait(0) == (not left)
        assert fence.waiting == sorted(left)
        if isinstance(call, set):
            fence.keep(call)
            left &= call
        else:
            fence.release(call)
            left.discard(call)
    assert fence.wait(0) == (not left)
    fence.keep(set())
    assert fence.wait(0)


def test_a_fence_is_released_from_other_threads_while_it_is_waited_for() -> None:
    """The waiting thread goes on once all have released, each more than once and at the same time."""
    names = [f"observer {at}" for at in range(8)]
    for _ in range(50):
        fence = Fence(names)
        passed: list[bool] = []
        loop = threading.Thread(target=lambda fence=fence, passed=passed: passed.append(fence.wait(LIMIT_S)))
        loop.start()
        threads = [threading.Thread(target=fence.release, args=(name,)) for name in [*names, *names]]
        for thread in threads:
            thread.start()
        for thread in [*threads, loop]:
            thread.join(LIMIT_S)
        assert passed == [True]
        assert fence.waiting == []
