"""The program of a launched run: builds the trainer that a factory returns, runs it, and heeds who launched it.

It is started by `trainer.launcher`, as ``python -m trainer.launched FD``. Lines of JSON come in on standard input:
first `LaunchConfig`, then commands (`events.wire`) and `Cancel`. Messages go out through the pipe FD, in msgpack behind
their length: `Ready` when the run is under way, at the end `Ended` or `Failed`. Nothing is ever unpickled. Events are
no messages: whoever wants them reads the run's journal.

When the process that launched it dies, in whatever way, the run is stopped with a checkpoint, and the program ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import inspect
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import msgspec

from events import log, notice
from events.errors import RunFolderError, WireError
from events.log import Warned, current_origin, logger
from events.protocol import RunResult, Stop
from events.safe_files import open_below
from events.tracebacks import without_controls
from events.wire import decode_command_json
from trainer.errors import ArgumentsError

if TYPE_CHECKING:
    from trainer.session import Session
    from trainer.trainer import Trainer

LOG_NAME = "log.txt"
"""What the process prints, within the run's folder."""
EXIT_S = 10.0
"""How long the interpreter may take to end once the run is over: threads and exit hooks of the user may hang."""
_LOG_LIMIT = 2**26
"""A log that has grown so long loses all but its end..."""
_LOG_KEPT = 2**20
"""...which is so long."""
_LOOK_S = 0.5
"""How often it looks whether its parent is there and how long the log is, and passes warnings on."""
_MOST_WARNINGS = 1_000
"""Maximum warnings kept between two looks; all are in the log."""
_SETTLE_S = 10.0
"""What a cancelled run may take beside the deadlines of its observers."""
_LENGTH = struct.Struct("<I")


class LaunchConfig(msgspec.Struct, frozen=True):
    """The first line to a launched run."""

    factory: str
    """``package.module:function``."""
    arguments: bytes
    """The factory's keyword arguments, as msgpack: unlike JSON it keeps NaN, infinities and bytes."""
    parent: int
    """Process id of who launched it."""
    run_id: str | None = None
    run_dir: str | None = None
    resume: str | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="command"):
    """End the run at its next step, as one whose task was cancelled: no command, for it has no orderly end."""

    reason: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The run is under way."""

    run_id: str
    attempt: int
    run_dir: str | None
    journal_dir: str | None
    log: str | None
    """Where everything is printed from now on; None: where it was until now."""
    log_offset: int
    """Where this attempt begins in it."""
    grace_s: float
    """How long the loop may take to a step boundary."""
    cancel_s: float
    """How long the end of a cancelled run may take at most."""


class Cancelling(msgspec.Struct, frozen=True, tag=True):
    """`Cancel` has arrived, so the process is not hung: it keeps its deadlines itself."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The run is over, and this is its result."""

    result: RunResult


class Failed(msgspec.Struct, frozen=True, tag=True):
    """There is no trainer, or the run has raised."""

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
        except Exception as broken:  # a stranger's `__str__`
            text = f"its text cannot be had, {type(broken).__name__}"
        kind = type(error)
        lines = "".join(traceback.format_exception(error))
        return cls(kind.__module__, kind.__qualname__, _unicode(text), _unicode(lines))


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A warning of the process, for the stderr or the log handlers of the process that launched it."""

    level: Literal["warning", "error"]
    message: str
    repeats: int
    """Identical ones before it, which were not shown."""
    run_id: str | None
    """None: it was logged outside of the run."""
    global_step: int

    @classmethod
    def of(cls, warned: Warned) -> Logged:
        """Describe what the current thread or task has logged."""
        origin = current_origin.get()
        run_id, step = (None, 0) if origin is None else (origin.run_id, origin.global_step)
        return cls(warned.level, _unicode(warned.message), warned.repeats, run_id, step)


Message = Ready | Cancelling | Ended | Failed | Logged
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def take_messages(data: bytes) -> tuple[list[Message], bytes]:
    """The whole messages at the front of what came through the pipe, and the rest."""
    messages: list[Message] = []
    while len(data) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        if len(data) < end:
            break
        messages.append(_decoder.decode(data[_LENGTH.size : end]))
        data = data[end:]
    return messages, data


def build(config: LaunchConfig) -> Trainer:
    """Have the factory build the trainer. Raises what its import, or it, raises."""
    module, _, name = config.factory.partition(":")
    factory: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(factory, part):
            raise ArgumentsError(f"launch: {config.factory!r}: {getattr(factory, '__name__', factory)} has no {part!r}")
        factory = getattr(factory, part)
    from trainer.trainer import Trainer, relocate, relocating

    token = relocating.set(True)
    try:
        built = factory(**msgspec.msgpack.decode(config.arguments))
    finally:
        relocating.reset(token)
    if inspect.iscoroutine(built):
        built.close()
    if not isinstance(built, Trainer):
        raise ArgumentsError(f"launch: {config.factory!r} must return a Trainer, not {built!r:.80}")
    relocate(built, config.run_id, config.run_dir, config.resume)
    return built


class Launched:
    """This end of the pipes, the log, and the watch over the parent.

    Args:
        config: The first line.
        commands: The lines that follow it.
        messages: File descriptor that messages go to.
    """

    def __init__(self, config: LaunchConfig, commands: Any, messages: int) -> None:
        self._parent = config.parent
        self._commands = commands
        self._messages = messages
        self._saying = threading.Lock()
        self._warnings: deque[Logged] = deque(maxlen=_MOST_WARNINGS)
        log.forward.append(self._add_warning)
        self._session: Session | None = None
        self._over = threading.Event()
        threading.Thread(target=self._listen, name="stagecast-launched-commands", daemon=True).start()
        threading.Thread(target=self._watch, name="stagecast-launched-watch", daemon=True).start()

    async def run(self, trainer: Trainer) -> RunResult:
        """Run it to its end. SIGTERM or SIGINT to this process alone stops it; a second one cancels it."""
        from trainer.calling_thread import heed_signals
        from trainer.trainer import RunContext

        context = RunContext(trainer)
        async with context as run:
            session = context.session

            def end(_: BaseException) -> None:
                session.bus.post(lambda: session.cancel("a second signal arrived"))
                session.hurry()

            with heed_signals(session.control, end):
                self._session = session  # first: who is told that it is ready may cancel it
                self._say_ready(session)
                await session.finished.wait()
        result: RunResult = await run.result()
        return result

    def conclude(self, outcome: RunResult | BaseException) -> None:
        """Say how it ended."""
        self._over.set()
        self._pass_warnings_on()
        if isinstance(outcome, BaseException):
            traceback.print_exception(without_controls(outcome))  # for whoever reads the log
            self._say(Failed.of(outcome))
        else:
            self._say(Ended(outcome))

    def _say_ready(self, session: Session) -> None:
        arguments, folder = session.arguments, session.folder
        log, offset = None, 0
        if folder is not None:
            log = folder.path / LOG_NAME
            offset = _continue_log(
                folder.path, f"[stagecast] run {session.origin.run_id}, attempt {session.origin.attempt}"
            )
        self._say(
            Ready(
                run_id=session.origin.run_id,
                attempt=session.origin.attempt,
                run_dir=None if folder is None else str(folder.path),
                journal_dir=None if session.journal_dir is None else str(session.journal_dir),
                log=None if log is None else str(log),
                log_offset=offset,
                grace_s=arguments.stop_grace_s,
                # Callbacks, what they logged last, the checkpoints' two observers, sinks, the journal.
                cancel_s=arguments.stop_grace_s + 6 * arguments.drain_timeout_s + _SETTLE_S,
            )
        )

    def _say(self, message: Message) -> None:
        data = msgspec.msgpack.encode(message)
        data = _LENGTH.pack(len(data)) + data
        with self._saying, contextlib.suppress(OSError):  # who launched it is gone
            while data:
                data = data[os.write(self._messages, data) :]

    def _add_warning(self, warned: Warned) -> None:
        self._warnings.append(Logged.of(warned))  # not written here: the pipe may be full, and this may be the loop

    def _pass_warnings_on(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._say(self._warnings.popleft())

    # ------------------------------------------------------------------------------------ on threads of its own

    def _listen(self) -> None:
        for line in self._commands:
            try:
                command = _cancel_or_command(line)
            except WireError as error:
                logger.warning(str(error))
                continue
            session = self._session
            if isinstance(command, Cancel):
                if session is not None:
                    self._cancel(session, command.reason)
            elif session is not None:
                session.control.send(command)

    def _cancel(self, session: Session, reason: str) -> None:
        def cancel() -> None:
            session.cancel(reason)
            self._say(Cancelling())

        session.bus.post(cancel)

    def _watch(self) -> None:
        """Notice that the parent has died. That standard input ends does not tell it: others may hold the pipe."""
        while os.getppid() == self._parent:
            _trim_log()
            self._pass_warnings_on()
            time.sleep(_LOOK_S)
        session = self._session
        if session is not None:
            gone = "the process that launched the run is gone"
            session.control.send(Stop(id="launched", reason=gone))
            deadline = time.monotonic() + session.arguments.stop_grace_s
            while not session.loop.ended.is_set() and not self._over.wait(0.1):
                if time.monotonic() > deadline:
                    session.bus.post(lambda: session.cancel(gone))
                    break
            self._over.wait()  # each observer's end has its own deadline
            time.sleep(EXIT_S)  # by then, the process has ended
        _end_group()


def _cancel_or_command(line: bytes) -> Any:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(line, type=Cancel)
    return decode_command_json(line)


def _continue_log(folder: Path, heading: str) -> int:
    """Print to the log of a run's folder, with what was printed before; returns where this attempt begins in it.

    Raises:
        RunFolderError: The log cannot be written to.
    """
    try:
        log = open_below(folder, LOG_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise RunFolderError(f"{folder / LOG_NAME} cannot be written: {error}; remove it") from error
    before = os.dup(1)
    try:
        offset = os.fstat(log).st_size
        os.write(log, f"{heading}, process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)  # first: what the loop prints meanwhile is not lost
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
    """Keep the log's end alone, once it is long. All who print share the file: they go on behind what is kept.

    What somebody prints in the milliseconds of the cut may be missing, or stand before what is kept.
    """
    with contextlib.suppress(OSError):
        size = os.fstat(1).st_size
        if size > _LOG_LIMIT:
            kept = os.pread(1, _LOG_KEPT, size - _LOG_KEPT)
            os.ftruncate(1, 0)
            os.lseek(1, 0, os.SEEK_SET)
            os.write(1, b"[stagecast] the log had grown too long; what stood here is gone\n" + kept)


def _end_group() -> None:
    """Leave nothing behind: no worker, not this process."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def main() -> None:
    """The program."""
    messages = int(sys.argv[1])
    os.set_inheritable(messages, False)
    commands = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # who reads standard input, such as a debugger, must not take our commands
    os.close(null)
    notice.is_kept = True  # in a log of the run's folder
    faulthandler.enable()  # a segmentation fault says in the log where it was
    output: Any = sys.stdout
    output.reconfigure(line_buffering=True)  # what a killed process has printed must be there
    config = msgspec.json.decode(commands.readline(), type=LaunchConfig)
    launched = Launched(config, commands, messages)
    outcome: RunResult | BaseException

    async def run() -> RunResult | BaseException:
        try:
            return await launched.run(trainer)
        except BaseException as error:  # SystemExit from a step must not reach the event loop
            return error

    try:
        trainer = build(config)
        outcome = anyio.run(run)
    except BaseException as error:  # the process's border: who launched it is told
        outcome = error
    launched.conclude(outcome)
    if not isinstance(outcome, RunResult):
        sys.exit(1)


if __name__ == "__main__":
    main()
