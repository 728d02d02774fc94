"""Launching a run in a process of its own, and watching and steering it from here.

Events come from the run's journal (`events.run.stream`), so that watching costs the run nothing. torch is not
imported here: a service that launches runs need not have it in memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import IO

import anyio
import msgspec

from events.errors import CursorError, RunCancelled
from events.log import logger
from events.masking import own_command_line
from events.messages import Event
from events.process import Child, Program
from events.protocol import AnyCommand, EventStream, RunResult
from events.run.run import Run
from events.run.stream import JournalEventStream
from trainer.errors import ArgumentsError, PeerFailed
from trainer.remote.child import (
    EXIT_S,
    Cancel,
    Cancelling,
    Failed,
    FromRun,
    LaunchConfig,
    Logged,
    Ready,
    from_run,
)
from trainer.remote.launch_arguments import absolute, encoded, problems_of, problems_of_ranks
from trainer.remote.launch_report import crash, error_of
from trainer.remote.rank import Join, Serving
from trainer.run.cancellation import end_with_block

_LOST_S = 20.0
"""Maximum seconds for the end of the other ranks after one has failed; they need a few to name it..."""
_JOINING_S = 3.0
"""...and those that still wait for it to join do not know."""
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
    processes: int = 1,
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
        python: The interpreter; None for this one, which then finds the modules that this process finds.
        cwd: Its working directory; None for that of this process.
        env: Environment variables in addition to those of this process.
        processes: Number of processes that train the run together, as the ranks of ``torchrun --nproc-per-node`` do:
            see the guide Scale. Each calls the factory. The `Run` is that of rank 0; the others' output is in
            ``log-rank-K.txt``. If one fails, dies or hangs, all end, and the exception names its rank.

    Raises:
        ArgumentsError: An argument is wrong; or, when the block is entered, the factory returns no trainer.
        LaunchedRunFailed: The factory or the run raised an exception. Errors of stagecast keep their type.
        LaunchedRunCrashed: The process died before the run was over.
        RunCancelled: The run was cancelled.
        OSError: The process cannot be started.
    """
    problems = [*problems_of(factory, run_id, run_dir, resume, env), *problems_of_ranks(processes, env)]
    packed = encoded(arguments if arguments is not None else {}, problems)
    if problems:
        raise ArgumentsError("launch: " + "; ".join(problems))
    run_dir = None if run_dir is None else os.path.abspath(run_dir)
    resume = None if resume is None else absolute(os.fspath(resume))
    interpreter, folder = (None if path is None else os.fspath(path) for path in (python, cwd))
    program = Program.of_module("trainer.remote.child", interpreter, env or {}, folder)
    config = LaunchConfig(factory, packed, run_id, run_dir, resume, own_command_line(), processes)
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
    """A run in other processes: commands go through the channel of rank 0, events come through the journal.

    All that waits for a process is on a thread of its own, in `live` for rank 0; tasks only look. So nothing waits for
    it in an event loop, and no cancellation leaves a process behind.
    """

    def __init__(self, config: LaunchConfig, program: Program) -> None:
        self.started, self.finished = ThreadFlag(), ThreadFlag()
        self.error: BaseException | None = None
        self.children: list[Child[FromRun]] = []
        self._readies: dict[int, Ready] = {}  # by rank
        self._ended: set[int] = set()  # ranks that have sent how the run ended
        self._decided = ThreadFlag()
        self._config, self._program = config, program
        self._result: RunResult | None = None
        self._cancel_reason: str | None = None
        self._peer_failed: BaseException | None = None

    @property
    def ready(self) -> Ready | None:
        """The message of rank 0; None before the run is under way."""
        return self._readies.get(0)

    def cancel(self, reason: str) -> None:
        """End the run at its next step, and then the processes; kill those that take too long. Any thread."""
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
        self.children[0].send(command)

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

    # --------------------------------------------------------------------------- on a thread for each process

    def live(self) -> None:
        """Run the processes from their start to their death."""
        try:
            with contextlib.ExitStack() as files:
                logs = [files.enter_context(tempfile.TemporaryFile()) for _ in range(self._config.processes)]
                self._start(logs)
                self._ask_to_cancel()
                others = [
                    threading.Thread(target=self._attend, args=(rank, log), name=f"stagecast-rank-{rank}", daemon=True)
                    for rank, log in enumerate(logs)
                    if rank
                ]
                for thread in others:
                    thread.start()
                self._attend(0, logs[0])
                for thread in others:
                    thread.join()
            if not self._decided.is_set():
                self._fail(self._peer_failed or RuntimeError("the ranks have not reported how the run ended"))
        except BaseException as error:  # the thread's border: raised where the run is waited for
            self._fail(error)
        finally:
            for flag in (self._decided, self.finished, self.started):
                flag.set()

    def _start(self, logs: Sequence[IO[bytes]]) -> None:
        try:
            for rank, log in enumerate(logs):
                config = msgspec.structs.replace(self._config, rank=rank)
                self.children.append(Child(self._program, log, from_run, config))
        except BaseException:
            for child in self.children:
                child.kill()
                child.run(lambda message: None)
            raise

    def _attend(self, rank: int, log: IO[bytes]) -> None:
        """Take the messages of a process until it has died."""
        child = self.children[rank]
        try:
            code = child.run(functools.partial(self._take, rank))
            if rank not in self._ended and (self.cancelled or not child.is_overdue):
                self._fail(self._error_of_death(rank, code, log))
        except BaseException as error:  # the thread's border, as in `live`
            self._fail(error)

    def _ask_to_cancel(self) -> None:
        reason = self._cancel_reason
        if self.children and reason is not None and not self._decided.is_set():
            self.children[0].send(Cancel(reason))
            self._end_within(self.ready.grace_s if self.ready is not None else 0.0)

    def _end_within(self, timeout_s: float) -> None:
        for child in self.children:
            child.end_within(timeout_s)

    def _take(self, rank: int, message: FromRun) -> None:
        child = self.children[rank]
        if isinstance(message, Ready):
            self._readies[rank] = message
            if rank == 0:
                self.started.set()
                self._ask_to_cancel()  # again: a run that is not ready ignores it
        elif isinstance(message, Serving):
            for other in self.children[1:]:
                other.send(Join(message.port))
        elif isinstance(message, Cancelling):
            self._end_within(self.ready.cancel_s if self.ready is not None else 0.0)
        elif isinstance(message, Logged):
            _log(message, rank)
        else:
            self._ended.add(rank)
            if isinstance(message, Failed):
                self._fail(error_of(message, rank if self._config.processes > 1 else None))
            elif rank == 0:
                self._result = result = message.result
                for problem in result.problems:
                    logger.warning(problem, run_id=result.run_id, global_step=result.global_step)
                self._decided.set()
                self._end_within(EXIT_S)
            child.end_within(EXIT_S)
            child.spares_group = not self.cancelled

    def _fail(self, error: BaseException) -> None:
        """End the run on all ranks because of the first error; that another rank has failed is none of its own."""
        if isinstance(error, PeerFailed):
            self._peer_failed = self._peer_failed or error
        elif not self._decided.is_set():
            self.error = error
            self._decided.set()
        if not self.cancelled:
            self._end_within(_LOST_S if self.ready is not None else _JOINING_S)

    def _error_of_death(self, rank: int, code: int | None, log: IO[bytes]) -> BaseException:
        if self._cancel_reason is None:
            of = rank if self._config.processes > 1 else None
            return crash(self._config.factory, self.ready, self._readies.get(rank), code, log, rank=of)
        name = self.ready.run_id if self.ready is not None else self._config.factory
        return RunCancelled(f"run {name} was cancelled: {self._cancel_reason}; its process was killed")


def _log(logged: Logged, rank: int) -> None:
    """Log a warning of a process here: its own stderr is a file."""
    warned = logged.warned
    text = warned.message + (f" [{warned.repeats:,} more like this before]" if warned.repeats else "")
    text = f"rank {rank}: {text}" if rank else text
    origin = {} if logged.run_id is None else {"run_id": logged.run_id, "global_step": logged.global_step}
    (logger.error if warned.level == "error" else logger.warning)(text, **origin)
