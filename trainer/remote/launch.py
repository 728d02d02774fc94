"""Launching a run in a process of its own, and watching and steering it from here.

The process belongs to a thread (`trainer.remote.process`). Events come from the run's journal
(`events.run.journal_stream`), so whoever watches costs the run nothing.

torch is not imported here: a service that launches runs need not have it in memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

import msgspec

from events.checkpoint.manifest import CheckpointName
from events.errors import CursorError
from events.messages import Event
from events.protocol import AnyCommand, EventStream, RunResult
from events.run.journal_stream import JournalEventStream
from events.run.run import Run
from events.wire import encode_command_json
from trainer.checkpoint.fetch import KEYWORDS
from trainer.errors import ArgumentsError
from trainer.remote.child import LaunchConfig
from trainer.remote.process import LaunchedProcess
from trainer.run.cancellation import outlast

_PLAIN = (type(None), bool, int, float, str, bytes)


def launch(
    factory: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    run_id: str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    python: str | os.PathLike[str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> AbstractAsyncContextManager[Run]:
    """Train in a process of its own, under asyncio or trio::

        # my_package/jobs.py
        def build_trainer(width: int) -> Trainer:
            return Trainer(Net(width), TrainerArguments(epochs=10))

        # anywhere
        async with launch("my_package.jobs:build_trainer", {"width": 256}) as run:
            async for event in run.events(since=0, types=[TrainEpochEnded]):
                print(event.epoch, event.loss)
        result = await run.result()

    The run is the same as that of `Trainer.run`, and so are the rules of its block: leaving it waits for the run and
    raises what it raised; an exception in the body, or any cancellation, ends the loop at its next step. But the loop
    has an interpreter, a device context and memory of its own: nothing that this process computes slows it down, and
    should it crash, this process goes on. A process that does not end in time is killed, with all the processes in its
    group. Should this process die, the run is stopped, with a checkpoint.

    Events come through the run's journal, a few dozen milliseconds late. What the process prints is in ``log.txt`` in
    the run's folder, where the Python stack of a fatal signal is found, too. Nothing is pickled. POSIX only.

    Args:
        factory: ``package.module:function``; called in the process, on its main thread, to return a `Trainer`.
        arguments: Its keyword arguments: None, bool, int, float, str, bytes, and lists and dicts of them.
        run_id: In place of what the factory gave its trainer, as the two below; None leaves that alone.
        run_dir: Relative to the working directory of this process.
        resume: As in `Trainer`: ``"auto"`` in a program that launches again what has crashed.
        python: The interpreter; None for this one, which then finds the modules that are found here. Another one needs
            stagecast, and what the factory imports.
        cwd: Its working directory; None for this one's.
        env: Environment variables to set there, beside those of this process.

    Raises:
        ArgumentsError: something given here is not what it must be; nothing was started. When the block is entered: the
            factory does not exist or returns no trainer.
        LaunchedRunFailed: the factory or the run raised; the errors of stagecast itself come as what they are.
        LaunchedRunCrashed: the process died before the run was over.
        RunCancelled: the run was cancelled.
        OSError: the process cannot be started.
    """
    problems = [*_problems_of(factory, run_id, run_dir, resume, env)]
    encoded = _encoded(arguments if arguments is not None else {}, problems)
    if sys.platform == "win32":
        problems.append("runs can be launched on POSIX systems only; Trainer.run works everywhere")
    if problems:
        raise ArgumentsError("launch: " + "; ".join(problems))
    config = LaunchConfig(
        factory=factory,
        arguments=encoded,
        parent=os.getpid(),
        run_id=run_id,
        run_dir=None if run_dir is None else os.path.abspath(run_dir),
        resume=None if resume is None else _absolute(os.fspath(resume)),
    )
    command, environment = _command(python, dict(env or {}))
    return _LaunchContext(LaunchedProcess(config, command, None if cwd is None else os.fspath(cwd), environment))


class _LaunchContext(AbstractAsyncContextManager[Run]):
    """The life of a launched run inside a task."""

    def __init__(self, process: LaunchedProcess) -> None:
        self._process = process

    async def __aenter__(self) -> Run:
        process = self._process
        process.start()
        try:
            await process.started.wait()
            if process.ready is None:
                await process.ended.wait()
        except BaseException:
            await self._cancelled("its task was cancelled")
            raise
        if process.ready is None:
            process.outcome()
        return Run(_ProcessConnection(process))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if error is not None:
            reason = "an exception left the block" if isinstance(error, Exception) else "its task was cancelled"
            cancelled = await self._cancelled(reason)
        else:
            cancelled = await self._outlast()
        if cancelled is not None and (error is None or isinstance(error, Exception)):
            raise cancelled  # came while the end was waited for; the body's exception, if there is one, is its context
        if error is not None:
            return  # goes on as itself
        process.outcome()

    async def _cancelled(self, reason: str) -> BaseException | None:
        self._process.cancel(reason)
        return await self._outlast()

    async def _outlast(self) -> BaseException | None:
        process = self._process
        ended: Any = process.ended  # of an event, `outlast` uses what this one has, too
        return await outlast(ended, lambda: process.cancelled, lambda: process.cancel("its task was cancelled"))


class _ProcessConnection:
    """The run protocol to another process: commands through a pipe, events through the journal."""

    def __init__(self, process: LaunchedProcess) -> None:
        assert process.ready is not None
        self._process = process
        self._ready = process.ready

    @property
    def run_id(self) -> str:
        return self._ready.run_id

    def send(self, command: AnyCommand) -> None:
        self._process.send(encode_command_json(command))

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        ready = self._ready
        if ready.journal_dir is None:
            raise CursorError(
                f"run {ready.run_id} keeps no journal, through which a run in another process is watched; let the"
                f" factory give its Trainer journal=True"
            )
        return JournalEventStream(ready.journal_dir, ready.attempt, self._process.decided.is_set, since, types)

    async def result(self) -> RunResult:
        await self._process.decided.wait()
        return self._process.outcome()


def _command(python: str | os.PathLike[str] | None, env: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """How to start the program, and its environment."""
    environment = {**os.environ, **env}
    if python is not None and os.fspath(python) != sys.executable:
        return [os.fspath(python), "-m", "trainer.remote.child"], environment
    if "PYTHONPATH" not in env:
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if isinstance(path, str))
    # -P: what happens to lie in the working directory comes before nothing else, unless it does so here.
    return [sys.executable, "-P", "-m", "trainer.remote.child"], environment


def _absolute(resume: str) -> str:
    """A path, as seen from another working directory; a keyword, an address and a checkpoint's name stay."""
    name = CheckpointName.parse(resume) is not None and not os.path.exists(resume)
    return resume if resume in KEYWORDS or "://" in resume or name else os.path.abspath(resume)


def _problems_of(factory: Any, run_id: Any, run_dir: Any, resume: Any, env: Any) -> Iterable[str]:
    module, colon, name = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        yield f"factory must be 'package.module:function', not {factory!r:.80}"
    elif module == "__main__":
        yield f"{factory!r} is in the script that runs here, which another process cannot import: move it to a module"
    if run_id is not None and (not isinstance(run_id, str) or not run_id):
        yield f"run_id must be a name, not {run_id!r:.80}"
    for place, path in (("run_dir", run_dir), ("resume", resume)):
        if path is not None and not (isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str) and path):
            yield f"{place} must be a path, not {path!r:.80}"
    if env is not None and not (
        isinstance(env, Mapping) and all(isinstance(part, str) for pair in env.items() for part in pair)
    ):
        yield f"env must map names to texts, not {env!r:.80}"
    elif env is not None:
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value:
                yield f"env: no environment has {name!r:.80}={value!r:.80}: no '=' in a name, and no NUL"


def _encoded(arguments: Any, problems: list[str]) -> bytes:
    """The arguments as msgpack, which brings them over as what they are (but tuples as lists)."""
    if not isinstance(arguments, Mapping):
        problems.append(f"arguments must map names to values, not {arguments!r:.80}")
        return b""
    arguments = dict(arguments)
    try:
        before = len(problems)
        problems += [f"arguments{where}" for where in _unplain(arguments, "")]
        return msgspec.msgpack.encode(arguments) if len(problems) == before else b""
    except (RecursionError, OverflowError, ValueError) as error:  # a cycle, 2**64, a lone surrogate
        problems.append(f"arguments cannot be encoded: {error}")
        return b""


def _unplain(value: Any, where: str) -> Iterable[str]:
    """The places of what is no plain value."""
    if type(value) is dict:
        for key, part in value.items():
            if not isinstance(key, str):
                yield f"{where} has the key {key!r:.80}: keys must be texts"
            yield from _unplain(part, f"{where}[{key!r:.80}]")
    elif type(value) in (list, tuple):
        for number, part in enumerate(value):
            yield from _unplain(part, f"{where}[{number}]")
    elif type(value) not in _PLAIN:
        yield f"{where} is a {type(value).__name__}: give plain values, and let the factory build what it needs"
