"""Runs in a process of their own: watched, controlled, cancelled, crashed and killed.

Each needs the start of a Python with torch, so one process serves many assertions.
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from msgspec.structs import replace
from support.threads import wait_until
from support.training import Boom, Net, read_journal

from events.errors import CursorError, RunCancelled, UploadError
from events.journal.segment import segment_name
from events.masking import own_command_line
from events.messages import (
    BackwardEnded,
    CommandTaken,
    Event,
    RunEnded,
    RunResumed,
    RunStarted,
    TrainEpochEnded,
    TrainStepEnded,
)
from events.process import Program
from events.process import _frame as frame
from events.protocol import RunResult
from events.run.stream import JournalEventStream
from events.wire import encode_json_lines
from trainer import Trainer
from trainer.errors import ArgumentsError, LaunchedRunCrashed, LaunchedRunFailed
from trainer.remote.child import Cancelling, Ended, Failed, LaunchConfig, Ready, build, from_run
from trainer.remote.launch import LaunchedRun, launch
from trainer.remote.launch_arguments import absolute
from trainer.remote.launch_report import error_of

JOBS = Path(__file__).parent / "launched"
FOREVER = 1_000_000
LIMIT_S = 40.0
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.fixture(autouse=True)
def _jobs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the factories importable in both processes; no process may outlive its test."""
    monkeypatch.syspath_prepend(str(JOBS))
    yield
    assert processes(os.getpid()) == []


def processes(parent: int) -> list[int]:
    """Return the live launched runs of a process: each leads a process group."""
    return [pid for pid, about in _all_processes() if about == (parent, pid)]


def group(leader: int) -> list[int]:
    """Return the live processes of a group."""
    return [pid for pid, about in _all_processes() if about[1] == leader]


def _all_processes() -> list[tuple[int, tuple[int, int]]]:
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            state, parent, leader, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            found.append((pid, (int(parent), int(leader))))
    return found


async def until_soon(happens: Callable[[], Any], what: str) -> Any:
    with anyio.fail_after(LIMIT_S):
        while not (value := happens()):  # noqa: ASYNC110  # another process does it
            await anyio.sleep(0.01)
    return value


async def pid_of(run: Any) -> int:
    """Return the process of a run, once it has taken a few steps."""
    async for event in run.events(since=0, types=[RunStarted, TrainStepEnded]):
        if isinstance(event, RunStarted):
            pid = event.pid
        elif event.global_step >= 3:
            return pid
    raise AssertionError("it has ended")


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("jobs",), "'package.module:function', not 'jobs'"),
        (("a:b c",), "'package.module:function'"),
        ((3,), "'package.module:function', not 3"),
        (("__main__:build",), "move it to a module"),
        (("a:b", {"net": [1, {"x": object()}]}), r"arguments\['net'\]\[1\]\['x'\] is a object: give plain values"),
        (("a:b", {"path": Path("x")}), r"arguments\['path'\] is a PosixPath"),
        (("a:b", {"big": 2**70}), "arguments cannot be encoded"),
        (("a:b", {"keys": {1: 2}}), "has the key 1: keys must be texts"),
        (("a:b", [1]), r"arguments must map names to values, not \[1\]"),
        (("a:b", "x"), "arguments must map names to values, not 'x'"),
    ],
)
def test_invalid_arguments_are_refused_before_a_process_starts(given: Any, told: str) -> None:
    with pytest.raises(ArgumentsError, match=told):
        launch(*given)


def test_launch_or_the_factory_names_the_run_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = types.ModuleType("resuming_job")
    job.build = lambda: Trainer(Net(), resume="auto")
    monkeypatch.setitem(sys.modules, "resuming_job", job)
    config = LaunchConfig("resuming_job:build", msgspec.msgpack.encode({}))
    assert build(replace(config, run_id="named"))._run_id == "named"
    with pytest.raises(ArgumentsError, match="launch: resume='auto' needs to know the run; give run_id or run_dir"):
        build(config)
    with pytest.raises(ArgumentsError, match="Trainer: resume='auto'"):
        job.build()


def test_only_paths_to_resume_from_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for resume in ("auto", "best", "s3://bucket/run", "step-5.a1"):
        assert absolute(resume) == resume
    (tmp_path / "step-6.a1").mkdir()
    assert absolute("step-6.a1") == str(tmp_path / "step-6.a1")
    assert absolute("runs/x") == str(tmp_path / "runs/x")


def test_invalid_options_are_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    options: Any = {"run_id": 5, "run_dir": b"x", "resume": "", "env": {"A": 1}}
    with pytest.raises(ArgumentsError, match="run_id must"):
        launch("a:b", {"a": cycle}, **options)
    for place, given in (("run_id", "\udc80"), ("run_dir", Path("run-\udcff")), ("resume", "\udcff"), ("resume", b"x")):
        with pytest.raises(ArgumentsError, match=f"{place} must be a"):
            launch("a:b", **{place: given})
    for env in ({"A=": "b"}, {"": "b"}, {"A": "b\0"}, {"A\0": "b"}):
        with pytest.raises(ArgumentsError, match="env: no environment has"):
            launch("a:b", env=env)


@asyncio_only
@pytest.mark.anyio
async def test_entering_the_block_raises_why_a_run_cannot_start(tmp_path: Path) -> None:
    expected: list[tuple[Any, dict[str, Any], type[BaseException], str]] = [
        ("no_such_module:build", {}, LaunchedRunFailed, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("launched_exit:build", {}, LaunchedRunFailed, "SystemExit: not today"),
        ("launched_light:no", {}, ArgumentsError, "module 'launched_light' has no attribute 'no'"),
        ("launched_light:build_nothing", {}, ArgumentsError, "must return a Trainer, not 5"),
        ("launched_light:build_with", {}, LaunchedRunFailed, "missing 1 required positional argument: 'width'"),
        ("launched_light:build_and_vanish", {}, LaunchedRunCrashed, "exit code 9 before the run began"),
        ("launched_jobs:build", {"python": tmp_path / "python"}, FileNotFoundError, "python"),
        ("launched_jobs:build", {"cwd": tmp_path / "nowhere"}, FileNotFoundError, "nowhere"),
        ("launched_jobs:build", {"run_id": "a/b"}, ArgumentsError, "run_id must be a name without slashes"),
        ("launched_jobs:build", {"resume": tmp_path / "gone"}, Exception, "gone"),
    ]
    descriptors = len(os.listdir("/proc/self/fd"))
    limit = anyio.CapacityLimiter(3)
    caught: dict[int, BaseException] = {}

    async def enter(number: int, factory: str, options: Any) -> None:
        async with limit:
            try:
                async with launch(factory, run_dir=tmp_path / f"run-{number}", **options):
                    pass
            except Exception as error:
                caught[number] = error

    async with anyio.create_task_group() as tasks:
        for number, (factory, options, _, _) in enumerate(expected):
            tasks.start_soon(enter, number, factory, options)
    for number, (_, _, kind, text) in enumerate(expected):
        assert isinstance(caught[number], kind), repr(caught[number])
        assert text in str(caught[number])
    crashed: Any = caught[5]
    assert (crashed.returncode, crashed.signal, crashed.log_tail) == (9, None, "no memory\n")
    assert "    no memory" in str(crashed)
    await until_soon(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "a descriptor is left open")


# ------------------------------------------------------------------------------------------------- the stream


class Journal:
    """A journal that a test writes, line by line."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.path = folder / segment_name(1)
        self.over = False

    def write(self, *events: Event, end: bytes = b"") -> None:
        with open(self.path, "ab") as file:
            file.write(encode_json_lines(events) + end)

    def stream(self, since: int | None = 0, types: Any = None) -> JournalEventStream:
        return JournalEventStream(self.folder, 1, lambda: self.over, since, types)


def step(seq: int, attempt: int = 1) -> TrainStepEnded:
    return TrainStepEnded("run", attempt, seq, 1.0, 0, seq, 0, "train", loss=0.5)


@pytest.mark.anyio
async def test_a_stream_starts_now_ends_with_its_attempt_and_can_be_closed(tmp_path: Path) -> None:
    """Now is after the last whole line. Events of a later attempt end the stream."""
    journal = Journal(tmp_path / "journal")
    assert journal.stream(None).cursor == 0
    journal.write(step(1), step(2), end=b'{"type":"TrainSt')
    now, steps, closed = journal.stream(None), journal.stream(0, [RunEnded]), journal.stream()
    assert (now.cursor, steps.cursor) == (2, 0)
    assert (await anext(closed)).seq == 1
    await closed.aclose()
    assert closed.cursor == 1
    with pytest.raises(StopAsyncIteration):
        await anext(closed)
    (tmp_path / "journal" / segment_name(3)).write_bytes(b"")
    assert journal.stream(None).cursor == 2
    journal.path = tmp_path / "journal" / segment_name(3)
    journal.write(step(3), step(4, attempt=2), step(5, attempt=2))
    assert [event.seq async for event in now] == [3]
    assert [event async for event in steps] == []
    assert steps.cursor == 3


# ---------------------------------------------------------------------------------------- watched and steered


@pytest.mark.anyio
async def test_a_launched_run_has_the_events_and_commands_of_any_run(tmp_path: Path) -> None:
    values = {"nan": float("nan"), "data": b"\0\xff", "nested": {"a": [1, None, float("inf"), True, "ü"]}}
    seen: list[Event] = []

    async def watch_all(run: Any) -> None:
        async for event in run.events(since=0):
            seen.append(event)

    async def other(started: Any) -> None:
        async with launch("launched_jobs:build_with", {"run_dir": "chosen", "journal": False}, cwd=tmp_path) as run:
            assert run.run_id == "mine"
            with pytest.raises(CursorError, match="keeps no journal"):
                run.events()
        assert (await run.result()).run_dir == str(tmp_path / "chosen")
        started.set()

    async with anyio.create_task_group() as tasks:
        done = anyio.Event()
        tasks.start_soon(other, done)
        async with launch(
            "launched_jobs:build_checked", {**values, "epochs": FOREVER}, run_dir=tmp_path / "run", run_id="a"
        ) as run:
            tasks.start_soon(watch_all, run)
            assert run.run_id == "a"
            with pytest.raises(CursorError, match="BackwardEnded cannot be watched from another process"):
                run.events(types=[BackwardEnded, TrainStepEnded])
            epochs = run.events(since=0, types=[TrainEpochEnded])
            first = await anext(epochs)
            assert [type(first), first.epoch] == [TrainEpochEnded, 0]
            later = await run.events(since=first.seq).receive()
            assert later[0].seq == first.seq + 1
            checkpoint = await run.checkpoint("now")
            assert (Path(checkpoint) / "manifest.json").exists()
            now = run.events()
            run.pause()
            async for event in now:
                if isinstance(event, CommandTaken) and event.command == "pause":
                    break
            assert event.seq > first.seq
            run.resume("go")
            run.stop("enough")
            await done.wait()
            result = await run.result()
            late = [event async for event in run.events(since=0, types=[RunStarted, RunEnded])]
    assert await run.result() is result
    assert (result.status, result.reason, result.attempt) == ("stopped", "enough", 1)
    journal = read_journal(tmp_path / "run")
    assert seen == journal
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert [type(event) for event in late] == [RunStarted, RunEnded]
    started = seen[0]
    assert isinstance(started, RunStarted)
    # Arguments of the factory, which gave its trainer other epochs.
    assert math.isnan(started.config["nan"])
    assert started.config | {"nan": 0} == {"epochs": "many", "data": "AP8=", "nested": values["nested"], "nan": 0}
    assert started.command_line == own_command_line()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.startswith("[stagecast] run a, attempt 1, process ")
    assert log.endswith("\nbuilt\n")


@pytest.mark.cold_start
def test_a_service_that_launches_needs_no_torch(script: Any) -> None:
    """It imports no sink either."""
    program = script("import sys\nimport trainer.remote.launch\nprint('torch' in sys.modules, 'sinks' in sys.modules)")
    assert program.end() == (0, "False False\n", "")


@asyncio_only
@pytest.mark.anyio
async def test_a_signal_to_the_process_alone_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint. A thread that hangs at the end of the interpreter delays the end of the block only briefly."""
    monkeypatch.setattr("trainer.remote.launch.EXIT_S", 0.3)
    arguments = {"epochs": FOREVER, "deed": "linger", "at": 2, "step_s": 0.001}
    async with launch("launched_jobs:build", arguments, run_dir=tmp_path / "run") as run:
        os.kill(await pid_of(run), signal.SIGTERM)
    result = await run.result()
    assert (result.status, result.reason) == ("stopped", "SIGTERM")
    assert result.checkpoint is not None
    assert result.checkpoint.endswith(f"step-{result.global_step}.a1")


@asyncio_only
@pytest.mark.anyio
async def test_a_second_signal_to_the_process_alone_cancels_the_run(tmp_path: Path) -> None:
    arguments = {"epochs": FOREVER, "deed": "", "step_s": 1.0}
    with pytest.raises(RunCancelled, match="a second signal arrived"):
        async with launch("launched_jobs:build", arguments, run_dir=tmp_path / "run") as run:
            pid = await pid_of(run)
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@asyncio_only
@pytest.mark.anyio
@pytest.mark.parametrize("deaf", ["to the request", "to its own deadlines"])
async def test_a_cancelled_process_that_keeps_no_deadline_is_killed(deaf: str) -> None:
    """With its child processes, whether or not it has acknowledged the request."""
    frames = [frame(Ready("run", 1, None, None, 0, grace_s=0.2, cancel_s=0.2)), frame(Cancelling())]
    text = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork(): os.write(int(sys.argv[1]), {said!r})\ntime.sleep(100)"
    )
    said = b"".join(frames[:1] if deaf == "to the request" else frames)
    program = Program([sys.executable, "-S", "-c", text.format(said=said)], os.environ)
    run = LaunchedRun(LaunchConfig("no:factory", b""), program)
    threading.Thread(target=run.live, daemon=True).start()
    with anyio.fail_after(LIMIT_S):
        await run.started.wait()
        (child,) = run.children
        assert child is not None
        pid = child.pid
        assert pid is not None
        run.cancel("no time")
        await run.finished.wait()
    with pytest.raises(RunCancelled, match="run run was cancelled: no time; its process was killed"):
        run.outcome()
    await until_soon(lambda: group(pid) == [], "a process is left")


def sent(message: Any) -> Any:
    """Return a message of the process as this process receives it."""
    return from_run.decode(frame(message)[4:])


# -------------------------------------------------------------------------------------------- failures and crashes


def test_errors_of_stagecast_keep_their_type() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    error = error_of(sent(Failed.of(UploadError("no bucket \udc80"))))
    assert (type(error), str(error)) == (UploadError, "no bucket \\udc80")
    assert "in the launched process:" in error.__notes__[0]
    result = RunResult(run_id="run", attempt=1, status="stopped", reason="\udcff", metrics={"loss": float("nan")})
    assert sent(Ended(result)).result.reason == "\\udcff"
    error = error_of(Failed.of(Mute()))
    assert isinstance(error, LaunchedRunFailed)
    assert error.text == "its text cannot be read: ValueError"
    again = pickle.loads(pickle.dumps(LaunchedRunCrashed("x", returncode=-9)))  # to another worker of the host's
    assert (str(again), again.signal) == ("x", "SIGKILL")


@asyncio_only
@pytest.mark.anyio
async def test_an_exception_of_a_step_is_raised_as_a_launched_run_failed(tmp_path: Path) -> None:
    errors: dict[str, Any] = {}

    async def train(deed: str) -> None:
        try:
            async with launch("launched_jobs:build", {"deed": deed, "at": 2}, run_dir=tmp_path / deed) as run:
                with pytest.raises(Exception) as caught:  # noqa: PT011  # compared below
                    await run.result()
        except Exception as error:
            errors[deed] = error
        assert errors[deed] is caught.value

    async with anyio.create_task_group() as tasks:
        for deed in ("fail", "leave"):
            tasks.start_soon(train, deed)
    failed = errors["fail"]
    assert isinstance(failed, LaunchedRunFailed)
    assert (failed.type_name, failed.text) == ("launched_jobs.Diverged", "it was höher")
    assert str(failed) == "launched_jobs.Diverged: it was höher"
    for part in ("ValueError: the cause", "in fail", "stagecast: in train_step after global_step 1"):
        assert part in failed.traceback
        assert part in failed.__notes__[0]
    log = (tmp_path / "fail/log.txt").read_text()
    assert "about to fail" in log
    assert "Diverged: it was höher" in log
    assert (errors["leave"].type_name, errors["leave"].text) == ("SystemExit", "3")
    assert read_journal(tmp_path / "fail")[-1].status == "failed"


@asyncio_only
@pytest.mark.anyio
async def test_a_crash_is_reported_in_full(tmp_path: Path) -> None:
    """Its signal or exit code, the end of the journal, the output and the stack; the run can be resumed.

    No dataloader worker is left, and none delays this process.
    """
    crashes: dict[str, Any] = {}

    async def train(deed: str, **arguments: Any) -> None:
        events: list[Event] = []
        pid = 0

        def workers_are_there() -> bool:
            return len(group(pid)) >= 3

        with pytest.raises(LaunchedRunCrashed) as caught:
            arguments |= {"deed": deed, "epochs": FOREVER}
            async with launch("launched_jobs:build", arguments, run_dir=tmp_path / deed, run_id="it") as run:
                async for event in run.events(since=0):
                    if isinstance(event, RunStarted):
                        pid = event.pid
                    if deed == "" and event.global_step == 5 and isinstance(event, TrainStepEnded):
                        await until_soon(workers_are_there, "there are no workers")
                        os.kill(pid, signal.SIGKILL)
                    events.append(event)
                await run.result()
        crashes[deed] = caught.value
        assert events == read_journal(tmp_path / deed)
        await until_soon(lambda: group(pid) == [], "a process is left")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: train("", workers=2, step_s=0.01))
        tasks.start_soon(lambda: train("segfault", at=30))
        tasks.start_soon(lambda: train("vanish", workers=2, step_s=0.01, at=30, every_steps=2))
    killed, segfault, vanished = crashes[""], crashes["segfault"], crashes["vanish"]
    assert (killed.returncode, killed.signal) == (-9, "SIGKILL")
    assert "the kernel because memory ran out" in str(killed)
    assert "launch it again with run_id='it', run_dir=" in str(killed)
    assert 0 < len(killed.last_events) <= 20
    assert (segfault.returncode, segfault.signal) == (-11, "SIGSEGV")
    assert "about to crash" in segfault.log_tail
    assert "launched_jobs.py" in segfault.log_tail  # the Python stack
    assert "in segfault" in str(segfault)
    assert (vanished.returncode, vanished.signal) == (7, None)
    assert "ended with exit code 7; its journal reaches global_step" in str(vanished)

    async with launch(
        "launched_jobs:build", {"epochs": 60}, run_dir=tmp_path / "vanish", run_id="it", resume="auto"
    ) as run:
        resumed = await anext(run.events(since=0, types=[RunResumed]))
    assert resumed.attempt == 2
    assert resumed.global_step > 0
    assert ((await run.result()).status, (await run.result()).global_step) == ("finished", 120)
    assert (tmp_path / "vanish/log.txt").read_text().count("[stagecast] run it, attempt") == 2


@asyncio_only
@pytest.mark.anyio
async def test_a_process_that_prints_without_end_never_waits_and_its_log_is_bounded(tmp_path: Path) -> None:
    arguments = {"deed": "chatter", "at": 1, "epochs": FOREVER, "step_s": 0.005}
    log = tmp_path / "run/log.txt"

    def is_cut() -> bool:
        return log.stat().st_size < 2**25 and b"[stagecast] the log was too long" in log.read_bytes()

    async with launch("launched_jobs:build", arguments, run_dir=tmp_path / "run") as run:
        await pid_of(run)
        await until_soon(is_cut, "the log is not cut")
        await until_soon(lambda: log.read_bytes().endswith(b"more\n"), "nothing is printed any more")
        run.stop()
    printed = log.read_bytes()
    assert printed.count(b"[stagecast] the log was too long, and its beginning was removed\n") == 1
    assert printed.count(b"x" * 2**16) >= 8


# -------------------------------------------------------------------------------------------------- cancellation


async def check_cancelled(folder: Path, pid: int, run: Any) -> None:
    """Check that the run has ended cleanly and that no process is left."""
    ends = [event.status for event in read_journal(folder) if isinstance(event, RunEnded)]
    assert ends == ["cancelled"]
    await until_soon(lambda: group(pid) == [], "a process is left")
    with pytest.raises(RunCancelled, match="was cancelled"):
        await run.result()


@pytest.mark.anyio
async def test_cancelling_ends_the_process_in_every_phase(tmp_path: Path) -> None:
    async def by_exception() -> None:
        arguments = {"epochs": FOREVER, "workers": 2}
        with pytest.raises(Boom):
            async with launch("launched_jobs:build", arguments, run_dir=tmp_path / "exception") as run:
                pid = await pid_of(run)
                raise Boom
        await check_cancelled(tmp_path / "exception", pid, run)

    async def by_scope() -> None:
        with anyio.CancelScope() as scope:
            async with launch("launched_jobs:build", {"epochs": FOREVER}, run_dir=tmp_path / "scope") as run:
                pid = await pid_of(run)
                run.pause()
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        await check_cancelled(tmp_path / "scope", pid, run)

    async def at_the_end() -> None:
        with anyio.move_on_after(LIMIT_S) as scope:
            async with launch("launched_jobs:build", {"epochs": FOREVER}, run_dir=tmp_path / "end") as run:
                pid = await pid_of(run)
                scope.deadline = anyio.current_time() + 0.05
        assert scope.cancelled_caught
        await check_cancelled(tmp_path / "end", pid, run)

    async def while_it_starts() -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def enter() -> None:
                    async with launch("launched_light:build_slowly", cwd=tmp_path):
                        raise AssertionError("it never starts")

                tasks.start_soon(enter)
                await until_soon(lambda: "building-" in str(os.listdir(tmp_path)), "it does not start")
                scope.cancel()
        (building,) = [name for name in os.listdir(tmp_path) if name.startswith("building-")]
        pid = int(building.partition("-")[2])
        await until_soon(lambda: group(pid) == [], "a process is left")

    async with anyio.create_task_group() as tasks:
        for case in (by_exception, by_scope, at_the_end, while_it_starts):
            tasks.start_soon(case)


@asyncio_only
@pytest.mark.anyio
async def test_native_cancellations_wait_for_the_end_of_the_process(tmp_path: Path) -> None:
    runs: list[Any] = []

    async def hold(name: str) -> None:
        async with launch("launched_jobs:build", {"epochs": FOREVER}, run_dir=tmp_path / name) as run:
            pid = await pid_of(run)
            runs.append((name, pid, run))
            await anyio.sleep_forever()

    async def hold_with_timeout() -> None:
        async with asyncio.timeout(LIMIT_S) as timeout:
            holding = asyncio.create_task(hold("unrelated"))
            async with launch("launched_jobs:build", {"epochs": FOREVER}, run_dir=tmp_path / "timeout") as run:
                runs.append(("timeout", await pid_of(run), run))
                timeout.reschedule(0)
                holding.cancel()
                await anyio.sleep_forever()

    task = asyncio.create_task(hold("cancelled"))
    timing_out = asyncio.create_task(hold_with_timeout())
    await until_soon(lambda: any(name == "cancelled" for name, _, _ in runs), "it does not start")
    while not task.done():
        task.cancel()
        await anyio.sleep(0.01)
    assert task.cancelled()
    with pytest.raises(TimeoutError):
        await timing_out
    await until_soon(lambda: processes(os.getpid()) == [], "a process is left")
    for name, pid, run in runs:
        await check_cancelled(tmp_path / name, pid, run)


@asyncio_only
@pytest.mark.anyio
async def test_a_process_that_receives_nothing_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    """An extension holds the interpreter lock, so neither threads nor signal handlers run."""
    arguments = {"epochs": FOREVER, "deed": "hold_interpreter", "stop_grace_s": 0.5, "workers": 2}
    with pytest.raises(Boom):
        async with launch("launched_jobs:build", arguments, run_dir=tmp_path / "run", cwd=tmp_path) as run:
            await until_soon((tmp_path / "held").exists, "it does not reach its step")
            pid = (await anext(run.events(since=0, types=[RunStarted]))).pid
            raise Boom
    await until_soon(lambda: group(pid) == [], "a process is left")
    with pytest.raises(RunCancelled, match="its process was killed"):
        await run.result()


# ------------------------------------------------------------------------------------------- the parent's death

PARENT = """
import os, sys, time
sys.path.insert(0, {jobs!r})
import anyio
from trainer.remote.launch import launch
from events.messages import TrainStepEnded

async def main():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(starting)
        async with launch("launched_jobs:build", {arguments!r}, run_dir="run") as run:
            async for event in run.events(since=0, types=[TrainStepEnded]):
                if event.global_step > 5:
                    break
            while not any(name.startswith("building-") for name in os.listdir()):
                await anyio.sleep(0.01)
            worker = os.fork()  # it holds our ends of all pipes
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            print(worker, flush=True)
            print("ready", flush=True)
            await anyio.sleep_forever()

async def starting():
    async with launch("launched_light:build_slowly"):
        pass

anyio.run(main)
"""


def test_a_run_whose_parent_is_killed_stops_with_a_checkpoint(script: Any, tmp_path: Path) -> None:
    """Although a worker of the parent holds the pipes open. A process that still builds its trainer exits at once."""
    program = script(PARENT.format(jobs=str(JOBS), arguments={"epochs": FOREVER, "workers": 2, "step_s": 0.01}))
    assert program.process.stdout is not None
    worker = int(program.process.stdout.readline())
    program.wait_for("ready")
    leaders = processes(program.process.pid)
    assert len(leaders) == 2
    program.signal(signal.SIGKILL)
    try:
        wait_until(lambda: not any(group(pid) for pid in leaders), "a process is left")
    finally:
        os.kill(worker, signal.SIGKILL)
    journal = read_journal(tmp_path / "run")
    ended = next(event for event in journal if isinstance(event, RunEnded))
    assert (ended.status, ended.reason) == ("stopped", "the process that launched the run is gone")
    assert (tmp_path / f"run/checkpoints/step-{ended.global_step}.a1/manifest.json").exists()
