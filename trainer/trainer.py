"""The trainer and the doors to a run."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread

from events.checkpoint.objects import parse_url, run_url
from events.checkpoint.settings import Checkpoints
from events.errors import RunCancelled, SinkMisconfigured, UploadError
from events.journal import Journal
from events.messages import Event
from events.protocol import AnyCommand, EventStream, RunResult, Stop
from events.run import Run
from events.sink import Delivery, Place, delivery_of, require
from events.stream import LocalEventStream
from trainer.arguments import TrainerArguments
from trainer.cancellation import outlast
from trainer.control import Control
from trainer.errors import ArgumentsError
from trainer.fetch import fetch_for
from trainer.loop_thread import Task
from trainer.module_interface import CallbackInterface, ModuleInterface
from trainer.session import Callback, Session, SinkLike, console, new_run_id, split

_HURRIED_END_S = 5.0
"""How long `Trainer.train` waits, after a second signal, for observers that were told to be quick."""
_CLOSING_S = 1.0
"""How long it waits for its event loop to close, once the run is over: an async sink that hangs may keep it open."""


class Trainer:
    """Trains a module and publishes what happens.

    Each call of `train`, `run` or `test` is a run of its own (a new attempt at the same run, if ``run_id`` is
    given). The module is trained in place.

    Args:
        module: What to train. One run at a time may use it.
        arguments: How to train; the defaults if None.
        callbacks: Each gets every hook once, in order, on a thread of its own; pair one with a `Delivery` to choose
            otherwise.
        sinks: Observers of the events. None: the console in `train` and `test`, nothing in `run`. Pair one with a
            `Delivery` to choose how events are delivered to it.
        sinks_in: Where sinks run whose delivery does not say (``runs_in``). ``"thread"``: each on a thread of this
            process. ``"process"``: all in one process of their own, which reads the journal: what they compute never
            holds the loop's interpreter, and should that process die, another goes on where it was. What they print is
            in the run's folder, in ``sinks/host.log``.
        journal: Whether and how the run keeps its events on disk; on by default.
        run_id: The run's name; None for a new one each time. With the folder of an earlier attempt, the run is taken up
            again.
        run_dir: The run's folder; by default ``runs/RUN_ID`` below the working directory. Without a journal, without
            this and without `Checkpoints`, nothing is written.
        checkpoints: When checkpoints are taken and how many are kept. True: as `Checkpoints` says by default, where the
            run has a folder.
        resume: What to go on from. ``"auto"``: the newest whole checkpoint of the run's folder (or of where it uploads
            to, if there is none), or a new run if there is none. A path: of a checkpoint, or of a run's folder. An
            address in a remote store. None: begin anew. `test` takes over the module's state only.

    Raises:
        ArgumentsError: something given here is not what it must be.
    """

    def __init__(
        self,
        module: ModuleInterface,
        arguments: TrainerArguments | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        sinks: Iterable[SinkLike] | None = None,
        sinks_in: Place = "thread",
        journal: bool | Journal = True,
        run_id: str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        checkpoints: bool | Checkpoints = True,
        resume: str | os.PathLike[str] | None = None,
    ) -> None:
        self.module = module
        self.arguments = arguments if arguments is not None else TrainerArguments()
        problems: list[str] = []
        self._callbacks = _members("callbacks", callbacks, problems)
        self._sinks = None if sinks is None else _members("sinks", sinks, problems)
        self._sinks_in: Place = sinks_in
        self._journal = Journal() if journal is True else None if journal is False else journal
        self._run_id = run_id
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._resume = resume
        chosen: object = checkpoints
        if not isinstance(chosen, bool | Checkpoints):
            problems.append(f"checkpoints must be True, False or Checkpoints(...), not {_shown(checkpoints)}")
        if isinstance(checkpoints, Checkpoints) and checkpoints.upload is not None:
            try:
                parse_url(checkpoints.upload)
            except UploadError as error:
                problems.append(f"Checkpoints(upload=...): {error}")
        if not isinstance(resume, str | os.PathLike | None) or resume == "":
            problems.append(f"resume must be 'auto', a path, an address or None, not {_shown(resume)}")
        _check(self.module, self.arguments, self._callbacks, self._sinks, problems)
        _check_places(self._sinks, sinks_in, self._journal, problems)
        _check_folder(self._journal, run_id, run_dir, problems)
        if problems:
            raise ArgumentsError("Trainer: " + "; ".join(problems))

    def train(self) -> RunResult:
        """Train on the calling thread, and wait until the observers are drained.

        The event loop runs on a thread of its own, so this works on any thread, inside a running event loop too (which
        it blocks). On the main thread the first SIGINT or SIGTERM is a `Run.stop`, with a checkpoint; the second ends
        the run at once with KeyboardInterrupt or SystemExit, leaving observers no more than a moment; the handlers are
        restored. A signal that the process ignores stays ignored.

        Raises:
            RunFolderError: the run's folder cannot be used.
            BaseException: what a step, or an observer whose policy is fatal, raised; as itself.
        """
        return _outcome(self._run_here("train"))

    def test(self) -> dict[str, tuple[Any, ...]]:
        """Run the test stage over every dataloader of `ModuleInterface.get_test_dataloaders`, as `train` runs training.

        Returns:
            Per key the outputs of ``test_step``, collated, in host memory.

        Raises:
            ContractError: the module has no test dataloaders.
            EpochOutputsTooLarge: the outputs exceed ``epoch_outputs_limit_bytes``.
            StagecastError: the test was stopped before its end, so there are no whole outputs.
        """
        session = self._run_here("test")
        result = _outcome(session)
        if result.status != "finished":
            raise RunCancelled(f"the test was {result.status} before its end ({result.reason})")
        return session.loop.outputs

    def run(self) -> AbstractAsyncContextManager[Run]:
        """Train in a thread, inside a host's event loop, under asyncio or trio::

            async with trainer.run() as run:
                async for event in run.events(since=0):
                    ...
            result = await run.result()

        Leaving the block waits for the run and raises what it raised. An exception in the body, or any cancellation,
        stops the loop at its next step, waits for it and drains the observers; then it goes on as itself.

        Raises:
            RunFolderError: the run's folder cannot be used.
            TrainingThreadStuck: the run was cancelled and the loop did not reach a step boundary in time.
        """
        return _RunContext(self)

    def _run_here(self, task: Task) -> Session:
        on_main_thread = threading.current_thread() is threading.main_thread()
        control = Control()
        place = self._place()
        if place.is_remote:
            _interruptibly(place.fetch)
        return _run_here(
            lambda: self._session(task, control, place, default_sinks=True, interactive=on_main_thread), control
        )

    def _place(self) -> _Place:
        run_id = self._run_id or new_run_id()
        checkpoints, run_dir = self._checkpoints, self._run_dir
        has_folder = self._journal is not None or run_dir is not None or isinstance(checkpoints, Checkpoints)
        settings = Checkpoints() if checkpoints is True else checkpoints or None
        folder = Path(run_dir or Path("runs") / run_id)
        if settings is not None and settings.upload is not None:
            _check_upload(settings.upload, run_id, folder)
        return _Place(
            run_id,
            folder if has_folder else None,
            settings if has_folder else None,
            self._resume,
        )

    def _session(
        self, task: Task, control: Control, place: _Place, *, default_sinks: bool, interactive: bool
    ) -> Session:
        sinks = self._sinks
        if sinks is None:
            sinks = (console(),) if default_sinks else ()
        return Session(
            self.module,
            self.arguments,
            task=task,
            control=control,
            callbacks=self._callbacks,
            sinks=sinks,
            journal=self._journal,
            run_id=place.run_id,
            run_dir=place.run_dir,
            settings=place.settings,
            resume=place.resume,
            interactive=interactive,
            sinks_in=self._sinks_in,
        )


class _Place:
    """Where an attempt lives, and what it goes on from."""

    def __init__(
        self,
        run_id: str,
        run_dir: Path | None,
        settings: Checkpoints | None,
        resume: str | os.PathLike[str] | None,
    ) -> None:
        self.run_id = run_id
        self.run_dir = run_dir
        self.settings = settings
        self.resume = resume
        self._fetch = fetch_for(resume, settings, run_id, run_dir)

    @property
    def is_remote(self) -> bool:
        """Whether something has to be fetched first."""
        return self._fetch is not None

    def fetch(self) -> None:
        """Fetch it. Waits for the network."""
        if self._fetch is not None:
            self.resume = self._fetch() or self.resume


class _RunContext(AbstractAsyncContextManager[Run]):
    """The life of a run inside a host's task."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def __aenter__(self) -> Run:
        place = self._trainer._place()
        if place.is_remote:
            # A native cancellation leaves the thread behind: it lets the run's folder go when it has ended.
            await anyio.to_thread.run_sync(place.fetch, limiter=anyio.CapacityLimiter(1))
        self._session = self._trainer._session("train", Control(), place, default_sinks=False, interactive=False)
        try:
            self._session.loop.start()  # first, because it may fail; entering the task group cannot
        except BaseException:
            self._session.discard()
            raise
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._session.serve, name="stagecast run")
        self._connection = _LocalConnection(self._session)
        return Run(self._connection)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = self._session
        if error is not None:
            session.cancel("an exception left the block" if isinstance(error, Exception) else "its task was cancelled")
        cancelled = await outlast(
            session.finished, lambda: session.cancelled, lambda: session.cancel("its task was cancelled")
        )
        await self._close_tasks()
        if session.stuck and session.error is not None:
            raise session.error from error
        if cancelled is not None and (error is None or isinstance(error, Exception)):
            raise cancelled  # came while the end was waited for; the body's exception, if there is one, is its context
        if error is not None:
            return  # goes on as itself
        _outcome(session)

    async def _close_tasks(self) -> None:
        """End the task group, which is empty by now; its failure can only be our own bug, and is shown as it is."""
        await self._tasks.__aexit__(None, None, None)


class _LocalConnection:
    """The run protocol inside a process: messages are handed over as they are."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def run_id(self) -> str:
        return self._session.origin.run_id

    def send(self, command: AnyCommand) -> None:
        self._session.control.send(command)

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        session = self._session
        return LocalEventStream(session.bus, session.journal_dir, session.journal_settled, since, types)

    async def result(self) -> RunResult:
        await self._session.finished.wait()
        return _outcome(self._session)


def _outcome(session: Session) -> RunResult:
    if session.error is not None:
        raise session.error
    assert session.result is not None
    return session.result


def _run_here(make: Callable[[], Session], control: Control) -> Session:
    """Run the loop on this thread and the event loop on another, until both have ended.

    The session is made in its event loop: this thread may be in one of the host's, perhaps of another kind. A signal
    that comes meanwhile waits in ``control``.
    """
    made: queue.SimpleQueue[Session | BaseException] = queue.SimpleQueue()
    abandoned, ended = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    sessions: list[Session] = []

    async def main() -> None:
        session = make()
        if abandoned.is_set():
            session.discard()
            return
        sessions.append(session)
        made.put(session)
        await session.serve()
        ended.set()  # not only when the event loop is closed, which waits for whatever an async sink has left there

    def serve() -> None:
        try:
            anyio.run(main)
        except BaseException as error:  # the thread's border: raised on the calling thread
            failures.append(error)
            made.put(error)
        finally:
            ended.set()

    thread = threading.Thread(target=serve, name="stagecast-events", daemon=True)
    with _signals(control):
        try:
            thread.start()
            session = made.get()
            if isinstance(session, Session):
                session.loop.run()
        except BaseException:  # a second signal while a device or a folder is being opened, or right after that
            abandoned.set()
            for one in sessions:
                one.bus.post(one.loop.ended.set)
            raise
        if isinstance(session, Session):
            control.on_stop = session.leave_uploads
            try:
                ended.wait()  # by itself: a `join` that a signal interrupts takes the thread for ended (bpo-45274)
            except BaseException:  # a second signal while observers are drained
                session.hurry()
                if ended.wait(_HURRIED_END_S):
                    thread.join(_CLOSING_S)
                raise
            thread.join(_CLOSING_S)
            if not failures:
                return session
    raise failures[0]


def _interruptibly(function: Callable[[], None]) -> None:
    """Run it on a thread of its own: a signal ends the waiting, though the call may be deep in a library."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # the thread's border: raised on the calling one
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="stagecast-fetch", daemon=True).start()
    done.wait()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _signals(control: Control) -> Iterator[None]:
    """On the main thread: the first SIGINT or SIGTERM stops the run orderly, the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = itertools.count(1)

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        first = next(count) == 1
        if first and control.on_stop is not None:
            control.on_stop()
        elif first:
            control.send(Stop(id=f"signal-{name}", reason=name))
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    # One that the host ignores (`nohup`, a shell's background job) is none of ours.
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _check_upload(upload: str, run_id: str, run_dir: Path) -> None:
    """See that what is uploaded does not lie where the run itself does."""
    address = parse_url(run_url(upload, run_id))
    there, here = Path(address.prefix).resolve(), run_dir.resolve()
    if address.scheme == "file" and (there.is_relative_to(here) or here.is_relative_to(there)):
        raise ArgumentsError(
            f"Checkpoints(upload={upload!r}) would upload to {there}, and the run's own folder is {here}: choose"
            f" another place"
        )


def _members(name: str, given: Any, problems: list[str]) -> tuple[Any, ...]:
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        return tuple(given)
    problems.append(f"{name} must be a list, not {_shown(given)}; put a single one in brackets")
    return ()


def _check(
    module: Any, arguments: Any, callbacks: tuple[Any, ...], sinks: tuple[Any, ...] | None, problems: list[str]
) -> None:
    if not isinstance(module, ModuleInterface):
        problems.append(f"module must be an instance of a ModuleInterface, not {_shown(module)}")
    if not isinstance(arguments, TrainerArguments):
        problems.append(
            f"arguments must be TrainerArguments, not {_shown(arguments)}; TrainerArguments.from_dict builds them"
        )
    elif arguments.system_interval_s is not None:
        try:
            require("psutil", "system", "TrainerArguments(system_interval_s=...)")
        except SinkMisconfigured as error:
            problems.append(str(error))
    for number, callback in enumerate(callbacks):
        target, delivery = split(callback)
        if not isinstance(target, CallbackInterface) or not isinstance(delivery, Delivery | None):
            problems.append(
                f"callbacks[{number}] must be a CallbackInterface, or a pair of one and a Delivery, not"
                f" {_shown(callback)}"
            )
    for number, sink in enumerate(sinks or ()):
        target, delivery = split(sink)
        if isinstance(target, Journal):
            problems.append(f"sinks[{number}] is a Journal, of which a run has one: give it as journal=")
        is_sink = callable(getattr(target, "open", None)) and not isinstance(target, type)
        if not is_sink or not isinstance(delivery, Delivery | None):
            problems.append(
                f"sinks[{number}] must be a sink (an object with open(run)) or a pair of one and a Delivery, not"
                f" {_shown(sink)}"
            )
        elif callable(check := getattr(target, "check", None)):
            try:
                check()
            except SinkMisconfigured as error:
                problems.append(f"sinks[{number}]: {error}")


def _check_places(sinks: tuple[Any, ...] | None, sinks_in: Any, journal: Any, problems: list[str]) -> None:
    """See that what is to run in a process of its own can."""
    if sinks_in not in ("thread", "process"):
        problems.append(f"sinks_in must be 'thread' or 'process', not {_shown(sinks_in)}")
    for number, sink in enumerate(sinks or ()):
        target, delivery = split(sink)
        delivery = delivery if isinstance(delivery, Delivery) else delivery_of(target)
        if (delivery.runs_in or sinks_in) != "process" or not callable(getattr(target, "open", None)):
            continue
        if journal is None:
            problems.append(f"sinks[{number}] cannot run in a process of its own without the journal, which that reads")
        host: Any = importlib.import_module("sinks.host")
        try:
            host.HostedSink.of("", target, delivery, 0)
        except SinkMisconfigured as error:
            problems.append(f"sinks[{number}]: {error}")


def _check_folder(journal: Any, run_id: Any, run_dir: Any, problems: list[str]) -> None:
    if not isinstance(journal, Journal | None):
        problems.append(f"journal must be True, False or a Journal, not {_shown(journal)}")
    # The name is that of a folder below runs/, and must not lead out of it.
    if run_id is not None and (
        not isinstance(run_id, str) or run_id in ("", ".", "..") or {"/", os.sep, "\0"} & set(run_id)
    ):
        problems.append(f"run_id must be a name without slashes, not {_shown(run_id)}; run_dir chooses the folder")
    if run_dir is not None and not (isinstance(run_dir, str | os.PathLike) and os.fspath(run_dir)):
        problems.append(f"run_dir must be the path of a folder, not {_shown(run_dir)}")


def _shown(value: Any) -> str:
    return f"{value!r:.80}" if not isinstance(value, type) else f"the class {value.__name__}"
