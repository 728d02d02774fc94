"""The program of a launched run: builds the trainer that a factory returns, runs it, and obeys the process above it.

`trainer.remote.launch` starts it as an `events.process.Child`. It receives `LaunchConfig`, then commands and `Cancel`.
It sends `Ready` when the run is under way, `Logged` for each warning, and at the end `Ended` or `Failed`. Events are
not messages: the launching process reads the run's journal. Each of several processes is a rank of the run.

When the launching process dies, in whatever way, the run is stopped with a checkpoint, and the program ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from events import log, notice
from events.errors import RunFolderError
from events.log import Warned, current_origin
from events.process import Parent
from events.protocol import AnyCommand, RunResult, Stop
from events.safe_files import open_below
from events.tracebacks import without_controls
from trainer.errors import ArgumentsError
from trainer.remote.rank import Join, Serving, join_ranks

if TYPE_CHECKING:
    from trainer.run.session import Session
    from trainer.trainer import Trainer

EXIT_S = 10.0
"""Maximum seconds from the end of the run to the end of the process: threads and exit hooks of the user may hang."""
_LOG_LIMIT_BYTES = 2**26
"""A longer log is cut..."""
_LOG_KEPT_BYTES = 2**20
"""...to its last bytes."""
_MOST_WARNINGS = 1_000
"""Maximum warnings kept until they are sent; all are in the log."""
_SETTLE_S = 10.0
"""Maximum seconds for the end of a cancelled run beyond the deadlines of its observers."""


class LaunchConfig(msgspec.Struct, frozen=True):
    """The first message to a launched run."""

    factory: str
    """``package.module:function``."""
    arguments: bytes
    """The factory's keyword arguments in msgpack, as they were when `launch` was called."""
    run_id: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    command_line: str = ""
    """That of the launching process, for the record of the run."""
    processes: int = 1
    """Number of processes that train the run together..."""
    rank: int = 0
    """...and this one of them."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="command"):
    """End the run at its next step, as the cancellation of its task does: unlike a command, without the last hooks."""

    reason: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The run is under way."""

    run_id: str
    attempt: int
    run_dir: str | None
    journal_dir: str | None
    log_offset: int
    """Where this attempt begins in the log of the run's folder, which receives the output from now on."""
    grace_s: float
    """Maximum seconds for the loop to reach a step boundary."""
    cancel_s: float
    """Maximum seconds for the end of a cancelled run."""


class Cancelling(msgspec.Struct, frozen=True, tag=True):
    """`Cancel` was received: the process is not hung, and ends the run by its own deadlines."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The run is over, and this is its result."""

    result: RunResult


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The factory or the run raised an exception."""

    module: str
    """Of the exception's type."""
    name: str
    """The type's qualified name."""
    text: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """Describe an exception."""
        try:
            text = str(error)
        except Exception as broken:  # the user's `__str__`
            text = f"its text cannot be read: {type(broken).__name__}"
        kind = type(error)
        lines = "".join(traceback.format_exception(error))
        return cls(kind.__module__, kind.__qualname__, text, lines)


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A warning of the process, for stderr or the log handlers of the launching process."""

    warned: Warned
    run_id: str | None
    """None if it was logged outside of the run."""
    global_step: int


FromRun = Ready | Serving | Cancelling | Ended | Failed | Logged
from_run: msgspec.msgpack.Decoder[FromRun] = msgspec.msgpack.Decoder(FromRun)
_config: msgspec.msgpack.Decoder[LaunchConfig] = msgspec.msgpack.Decoder(LaunchConfig)
_to_run: msgspec.msgpack.Decoder[Cancel | Join | AnyCommand] = msgspec.msgpack.Decoder(Cancel | Join | AnyCommand)


def log_name(rank: int) -> str:
    """Return the name of the file in the run's folder with what a process prints."""
    return f"log-rank-{rank}.txt" if rank else "log.txt"


def build(config: LaunchConfig) -> Trainer:
    """Call the factory. Raises what it, or its import, raises."""
    module, _, name = config.factory.partition(":")
    imported = importlib.import_module(module)
    try:
        factory: Any = operator.attrgetter(name)(imported)
    except AttributeError as error:
        raise ArgumentsError(f"launch: {config.factory!r}: {error}; name a function of the module") from None
    from trainer.run.relocation import record_launch, relocate, relocating
    from trainer.trainer import Trainer

    token = relocating.set(True)
    try:
        built = factory(**msgspec.msgpack.decode(config.arguments))
    finally:
        relocating.reset(token)
    if inspect.iscoroutine(built):
        built.close()
    if not isinstance(built, Trainer):
        raise ArgumentsError(f"launch: {config.factory!r} must return a Trainer, not {built!r:.80}")
    if config.processes > 1 and built.arguments.strategy == "single":
        raise ArgumentsError(
            f"launch: strategy='single' trains in each of the {config.processes} processes for itself; let the factory"
            f" set it to 'auto'"
        )
    relocate(built, config.run_id, config.run_dir, config.resume)
    record_launch(built, msgspec.msgpack.decode(config.arguments), config.command_line)  # as the factory got them
    return built


class Launched:
    """The run, as messages from the launching process and the death of that process control it.

    Attributes:
        joins: Receives where the ranks meet.
    """

    def __init__(self, parent: Parent) -> None:
        self.joins: queue.SimpleQueue[Join] = queue.SimpleQueue()
        self._parent = parent
        self._warnings: deque[Logged] = deque(maxlen=_MOST_WARNINGS)
        log.forward.append(self._add_warning)
        self._session: Session | None = None
        self._over = threading.Event()
        parent.serve(_to_run, self._take, self._look_after_logs)

    async def run(self, trainer: Trainer) -> RunResult:
        """Run it to its end. SIGTERM or SIGINT to this process alone stops it; a second one cancels it."""
        from trainer.run.calling_thread import heed_signals
        from trainer.run.context import RunContext

        context = RunContext(trainer)
        async with context:
            session = context.session

            def end(_: BaseException) -> None:
                session.ring.post(lambda: session.cancel("a second signal arrived"))
                session.hurry()

            with heed_signals(session.control, end):
                self._session = session  # before `Ready`, because a cancellation may answer it
                self._parent.send(_ready(session))
                await session.finished.wait()
        return session.outcome()

    def conclude(self, outcome: RunResult | BaseException) -> None:
        """Send how the run ended."""
        self._over.set()
        self._send_warnings()
        if isinstance(outcome, BaseException):
            traceback.print_exception(without_controls(outcome))  # for the log
            self._parent.send(Failed.of(outcome))
        else:
            self._parent.send(Ended(outcome))

    def _add_warning(self, warned: Warned) -> None:
        origin = current_origin.get()
        run_id, step = (None, 0) if origin is None else (origin.run_id, origin.global_step)
        warned = warned._replace(exception=None)
        self._warnings.append(Logged(warned, run_id, step))  # sending may wait, and this may be the loop's thread

    def _send_warnings(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._parent.send(self._warnings.popleft())

    # ------------------------------------------------------------------------------------ on the parent's thread

    def _take(self, message: Cancel | Join | AnyCommand | None) -> None:
        session = self._session
        if message is None:
            self._end_without_parent(session)
        elif isinstance(message, Join):
            self.joins.put(message)
        elif session is None:
            pass  # the launching process repeats a cancellation once the run is ready, and sends no command before
        elif isinstance(message, Cancel):
            session.ring.post(functools.partial(self._cancel, session, message.reason))
        else:
            session.control.send(message)

    def _cancel(self, session: Session, reason: str) -> None:
        session.cancel(reason)
        self._parent.send(Cancelling())

    def _look_after_logs(self) -> None:
        _trim_log()
        self._send_warnings()

    def _end_without_parent(self, session: Session | None) -> None:
        if session is not None:
            gone = "the process that launched the run is gone"
            session.control.send(Stop(id="launched", reason=gone))
            deadline = time.monotonic() + session.arguments.stop_grace_s
            while not session.loop.ended.is_set() and not self._over.wait(0.1):
                if time.monotonic() > deadline:
                    session.ring.post(lambda: session.cancel(gone))
                    break
            self._over.wait()  # the end of each observer has a deadline
            time.sleep(EXIT_S)  # the process normally ends before this does
        _end_group()


def _ready(session: Session) -> Ready:
    arguments, origin, folder = session.arguments, session.origin, session.run_dir
    return Ready(
        run_id=origin.run_id,
        attempt=origin.attempt,
        run_dir=folder,
        journal_dir=None if session.journal_dir is None else str(session.journal_dir),
        log_offset=0
        if folder is None
        else _continue_log(folder, log_name(origin.rank), f"[stagecast] run {origin.run_id}, attempt {origin.attempt}"),
        grace_s=arguments.stop_grace_s,
        # Callbacks, what they logged last, the checkpoints' two observers, sinks, the journal.
        cancel_s=arguments.stop_grace_s + 6 * arguments.drain_timeout_s + _SETTLE_S,
    )


def _continue_log(folder: str, name: str, heading: str) -> int:
    """Move the output, with all that was printed before, to the log of a run folder; return where it begins there.

    Raises:
        RunFolderError: The log cannot be written to.
    """
    try:
        log = open_below(folder, name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise RunFolderError(f"{os.path.join(folder, name)} cannot be written: {error}; remove it") from error
    before = os.dup(1)
    try:
        offset = os.fstat(log).st_size
        os.write(log, f"{heading}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)  # before copying, so that nothing that the loop prints meanwhile is lost
        os.dup2(log, 2)
        position = 0
        while printed := os.pread(before, 2**20, position):
            os.write(log, printed)
            position += len(printed)
    finally:
        os.close(log)
        os.close(before)
    return offset


def _trim_log() -> None:
    """Cut a long log to its end. All writers share the file description, so they continue after the kept end.

    Output in the milliseconds of the cut may be lost, or appear before the kept end.
    """
    with contextlib.suppress(OSError):
        size = os.fstat(1).st_size
        if size > _LOG_LIMIT_BYTES:
            kept = os.pread(1, _LOG_KEPT_BYTES, size - _LOG_KEPT_BYTES)
            os.ftruncate(1, 0)
            os.lseek(1, 0, os.SEEK_SET)
            os.write(1, b"[stagecast] the log was too long, and its beginning was removed\n" + kept)


def _end_group() -> None:
    """Kill all workers, and this process."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Run the program."""
    parent = Parent()
    notice.is_kept = True  # stderr is a file of the run's folder
    config = parent.receive(_config)
    if config is None:
        return
    launched = Launched(parent)
    outcome: RunResult | BaseException

    async def run() -> RunResult | BaseException:
        try:
            return await launched.run(trainer)
        except BaseException as error:  # a SystemExit of a step must not reach the event loop
            return error

    try:
        if config.processes > 1:
            join_ranks(config.rank, config.processes, parent, launched.joins)
        trainer = build(config)
        outcome = anyio.run(run)
    except BaseException as error:  # the process's border: `Failed` reports it
        outcome = error
    launched.conclude(outcome)
    if not isinstance(outcome, RunResult):
        sys.exit(1)


if __name__ == "__main__":
    main()
