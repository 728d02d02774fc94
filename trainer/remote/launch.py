"""Launching a run in a process of its own, and watching and steering it from here.

Events come from the run's journal (`events.run.stream`), so that watching costs the run nothing. torch is not
imported here: a service that launches runs need not have it in memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import IO

import anyio
import msgspec

from events.checkpoint.manifest import CheckpointName
from events.errors import CursorError, RunCancelled
from events.log import logger
from events.masking import own_command_line
from events.messages import Event
from events.process import Child, Program
from events.protocol import AnyCommand, EventStream, RunResult
from events.run.run import Run
from events.run.stream import JournalEventStream
from events.text import is_encodable
from trainer.checkpoint.fetch import KEYWORDS
from trainer.errors import ArgumentsError
from trainer.remote.child import EXIT_S, Cancel, Cancelling, Ended, FromRun, LaunchConfig, Logged, Ready, from_run
from trainer.remote.launch_report import crash, error_of
from trainer.run.cancellation import end_with_block

_PLAIN = (type(None), bool, int, float, str, bytes)
_POLL_S = 0.02
"""Maximum seconds until a task sees that a flag was set."""


def launch(
    factory: str,
    arguments: Mapping[str, object] | None = None,
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
            print(await run.checkpoint())
        result = await run.result()

    The run, and its block, behave as those of `Trainer.run`. But the loop has an interpreter, a device context and
    memory of its own: nothing that this process computes slows it down, and it may crash alone. A process that does not
    end in time is killed, with its process group. If this process dies, the run is stopped with a checkpoint.

    Events come through the run's journal, a few dozen milliseconds late. The output of the process, and the Python
    stack of a fatal signal, are in ``log.txt`` in the run's folder. Nothing is pickled. POSIX only.

    Args:
        factory: ``package.module:function``; called on the main thread of the process to return a `Trainer`.
        arguments: Its keyword arguments: None, bool, int, float, str, bytes, and lists and dicts of them.
        run_id: Replaces the one that the factory gave its trainer, as do the next two; None keeps it.
        run_dir: Relative to the working directory of this process.
        resume: As in `Trainer`; ``"auto"`` in a program that launches a crashed run again.
        python: The interpreter; None for this one, which then finds the modules that this process finds. Another one
            needs stagecast and what the factory imports.
        cwd: Its working directory; None for that of this process.
        env: Environment variables in addition to those of this process.

    Raises:
        ArgumentsError: An argument is wrong; or, when the block is entered, the factory returns no trainer.
        LaunchedRunFailed: The factory or the run raised an exception. Errors of stagecast keep their type.
        LaunchedRunCrashed: The process died before the run was over.
        RunCancelled: The run was cancelled.
        OSError: The process cannot be started.
    """
    problems = [*_problems_of(factory, run_id, run_dir, resume, env)]
    encoded = _encoded(arguments if arguments is not None else {}, problems)
    if problems:
        raise ArgumentsError("launch: " + "; ".join(problems))
    run_dir = None if run_dir is None else os.path.abspath(run_dir)
    resume = None if resume is None else _absolute(os.fspath(resume))
    interpreter = None if python is None else os.fspath(python)
    folder = None if cwd is None else os.fspath(cwd)
    program = Program.of_module("trainer.remote.child", interpreter, env or {}, folder)
    config = LaunchConfig(factory, encoded, run_id, run_dir, resume, own_command_line())
    return _LaunchContext(LaunchedRun(config, program))


class _LaunchContext(AbstractAsyncContextManager[Run]):
    """The life of a launched run inside a task."""

    def __init__(self, launched: LaunchedRun) -> None:
        self._launched = launched

    async def __aenter__(self) -> Run:
        launched = self._launched
        threading.Thread(target=launched.live, name="stagecast-launched-run", daemon=True).start()
        try:
            await launched.started.wait()
        except BaseException as error:
            await end_with_block(launched, error)
            raise
        if launched.ready is None:
            launched.outcome()
        return Run(launched)

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await end_with_block(self._launched, error)


class ThreadFlag:
    """Set by a thread, waited for by any number of tasks in any event loop."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self.set = self._flag.set
        self.is_set = self._flag.is_set

    async def wait(self) -> None:
        """Wait until it is set."""
        while not self._flag.is_set():  # noqa: ASYNC110  # it belongs to no event loop, so it can wake none
            await anyio.sleep(_POLL_S)


class LaunchedRun:
    """A run in another process: commands go through its channel, events come through the journal.

    All that waits for the process is on one thread, in `live`; tasks only look. So nothing waits for it in an event
    loop, and no cancellation leaves a process behind.
    """

    def __init__(self, config: LaunchConfig, program: Program) -> None:
        self.ready: Ready | None = None
        self.started, self.finished = ThreadFlag(), ThreadFlag()
        self.error: BaseException | None = None
        self.child: Child[FromRun] | None = None
        self._decided = ThreadFlag()
        self._config, self._program = config, program
        self._result: RunResult | None = None
        self._cancel_reason: str | None = None

    def cancel(self, reason: str) -> None:
        """End the run at its next step, and then the process; kill it if it takes too long. Any thread."""
        if self._cancel_reason is None:
            self._cancel_reason = reason
            self._ask_to_cancel()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancel_reason is not None

    def outcome(self) -> RunResult:
        """Return the result of the run, once it is known; raises what the run raised."""
        if self.error is not None:
            raise self.error
        assert self._result is not None
        return self._result

    # -------------------------------------------------------------------------------------------- the protocol

    @property
    def run_id(self) -> str:
        assert self.ready is not None
        return self.ready.run_id

    def send(self, command: AnyCommand) -> None:
        assert self.child is not None
        self.child.send(command)

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        ready = self.ready
        assert ready is not None
        if ready.journal_dir is None:
            raise CursorError(
                f"run {ready.run_id} keeps no journal, through which a run in another process is watched; let the"
                f" factory give its Trainer journal=True"
            )
        return JournalEventStream(ready.journal_dir, ready.attempt, self._decided.is_set, since, types)

    async def result(self) -> RunResult:
        await self._decided.wait()
        return self.outcome()

    # ------------------------------------------------------------------------------------------ on its thread

    def live(self) -> None:
        """Run the process from its start to its death."""
        try:
            with tempfile.TemporaryFile() as log:
                self.child = child = Child(self._program, log, from_run, self._config)
                self._ask_to_cancel()
                code = child.run(self._take)
                if not self._decided.is_set():
                    self.error = self._error_of_death(code, log)
        except BaseException as error:  # the thread's border: raised where the run is waited for
            self.error = self.error or error
        finally:
            for flag in (self._decided, self.finished, self.started):
                flag.set()

    def _ask_to_cancel(self) -> None:
        child, reason = self.child, self._cancel_reason
        if child is not None and reason is not None and not self._decided.is_set():
            child.send(Cancel(reason))
            child.end_within(self.ready.grace_s if self.ready is not None else 0.0)

    def _take(self, message: FromRun) -> None:
        child = self.child
        assert child is not None
        if isinstance(message, Ready):
            self.ready = message
            self.started.set()
            self._ask_to_cancel()  # again: a run that is not ready ignores it
        elif isinstance(message, Cancelling):
            child.end_within(self.ready.cancel_s if self.ready is not None else 0.0)
        elif isinstance(message, Logged):
            _log(message)
        else:
            if isinstance(message, Ended):
                self._result = result = message.result
                for problem in result.problems:
                    logger.warning(problem, run_id=result.run_id, global_step=result.global_step)
            else:
                self.error = error_of(message)
            self._decided.set()
            child.end_within(EXIT_S)
            child.spares_group = not self.cancelled

    def _error_of_death(self, code: int | None, log: IO[bytes]) -> BaseException:
        if self._cancel_reason is None:
            return crash(self._config.factory, self.ready, code, log)
        name = self.ready.run_id if self.ready is not None else self._config.factory
        return RunCancelled(f"run {name} was cancelled: {self._cancel_reason}; its process was killed")


def _log(logged: Logged) -> None:
    """Log a warning of the process here: its own stderr is a file."""
    warned = logged.warned
    text = warned.message + (f" [{warned.repeats:,} more like this before]" if warned.repeats else "")
    origin = {} if logged.run_id is None else {"run_id": logged.run_id, "global_step": logged.global_step}
    (logger.error if warned.level == "error" else logger.warning)(text, **origin)


def _absolute(resume: str) -> str:
    """A path, as seen from another working directory; a keyword, an address and a checkpoint's name stay."""
    name = CheckpointName.parse(resume) is not None and not os.path.exists(resume)
    return resume if resume in KEYWORDS or "://" in resume or name else os.path.abspath(resume)


def _problems_of(factory: object, run_id: object, run_dir: object, resume: object, env: object) -> Iterable[str]:
    if sys.platform == "win32":
        yield "runs can be launched on POSIX systems only; Trainer.run works everywhere"
    module, colon, name = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        yield f"factory must be 'package.module:function', not {factory!r:.80}"
    elif module == "__main__":
        yield f"{factory!r} is in the script that runs here, which another process cannot import: move it to a module"
    if run_id is not None and not (isinstance(run_id, str) and run_id and is_encodable(run_id)):
        yield f"run_id must be a name, not {run_id!r:.80}"
    for place, path in (("run_dir", run_dir), ("resume", resume)):
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
        if path is not None and not (isinstance(text, str) and text and is_encodable(text)):
            yield f"{place} must be a path in Unicode, not {path!r:.80}"
    if env is not None and not (
        isinstance(env, Mapping) and all(isinstance(part, str) for pair in env.items() for part in pair)
    ):
        yield f"env must map names to texts, not {env!r:.80}"
    elif env is not None:
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value:
                yield f"env: no environment has {name!r:.80}={value!r:.80}: no '=' in a name, and no NUL"


def _encoded(arguments: object, problems: list[str]) -> bytes:
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


def _unplain(value: object, where: str) -> Iterable[str]:
    """Describe each value that is not plain."""
    if type(value) is dict:
        for key, part in value.items():
            if not isinstance(key, str):
                yield f"{where} has the key {key!r:.80}: keys must be texts"
            yield from _unplain(part, f"{where}[{key!r:.80}]")
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        for number, part in enumerate(value):
            yield from _unplain(part, f"{where}[{number}]")
    elif type(value) not in _PLAIN:
        yield f"{where} is a {type(value).__name__}: give plain values, from which the factory builds what it needs"
