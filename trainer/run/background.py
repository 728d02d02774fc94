"""A run that no block holds: it trains on threads of its own until it ends, or nothing refers to it any more."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import anyio

from events.errors import CursorError, RunCancelled
from events.ipython import kernel_shell
from events.log import logger
from events.messages import Event
from events.protocol import AnyCommand, EventStream, RunResult, Stop
from events.run.run import Run
from events.run.stream import JournalEventStream
from events.tracebacks import drop_own_frames
from trainer.run.context import RunContext

if TYPE_CHECKING:
    from trainer.run.session import Session
    from trainer.trainer import Trainer

_POLL_S = 0.05
_EXIT_S = 30.0
"""Maximum seconds for which the exit of the interpreter waits until runs have stopped, with their checkpoints."""
_under_way: set[Background] = set()


class Background:
    """A run on threads of its own. `start` returns once the loop runs, or raises the error that prevents it.

    Its event loop is not that of the caller, whose cells may block theirs.
    """

    session: Session
    """Once it has started."""
    result: RunResult | None = None
    """Once it is over, unless it failed."""

    def __init__(self, trainer: Trainer, sinks: Sequence[Any]) -> None:
        self._context = RunContext(trainer, sinks)
        self._news: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._is_abandoned = False
        self.over = threading.Event()
        """Set when the observers are drained."""
        self.error: BaseException | None = None
        self._frames: TracebackType | None = None  # of the error, without those of the event loop

    @property
    def refusal(self) -> str:
        """Why the same trainer cannot start another run now, while this one is not over."""
        if not hasattr(self, "session"):
            return "an interrupted start() of this trainer is still opening its run; call start() again in a moment"
        return f"run {self.session.origin.run_id} of this trainer is still under way; run.stop() ends it"

    def start(self) -> None:
        """Start to train; waits until a device and a folder are open."""
        try:
            threading.Thread(target=self._serve, name="stagecast-run", daemon=True).start()
            problem = self._news.get()
        except BaseException:  # Ctrl-C: no one will have the run
            self._is_abandoned = True
            if hasattr(self, "session"):  # it started at the same moment
                self.stop("the call that starts the run was interrupted")
            raise
        if problem is not None:
            raise problem

    def stop(self, reason: str) -> None:
        """Send a stop. Any thread."""
        self.session.control.send(Stop(id="background", reason=reason))

    def _serve(self) -> None:
        try:
            anyio.run(self._train)
        except BaseException as error:  # the thread's border: `result` raises it
            self.error = error
            self._news.put(error)  # for `start`, if that still waits
        finally:
            _under_way.discard(self)
            self.over.set()

    def raise_error(self) -> NoReturn:
        """Raise the exception that ended the run. May be called again."""
        __tracebackhide__ = True
        error = self.error
        assert error is not None
        error.__traceback__ = self._frames
        if kernel_shell() is not None:
            drop_own_frames(error)
        raise error

    async def _train(self) -> None:
        try:
            async with self._context as run:
                self.session = self._context.session
                _under_way.add(self)
                self._news.put(None)
                if self._is_abandoned:
                    raise RunCancelled("the call that starts the run was interrupted")
            self.result = await run.result()
        except BaseException as error:
            self._frames = error.__traceback__
            raise


class BackgroundConnection:
    """The run protocol to a run on threads of its own, from any event loop."""

    def __init__(self, run: Background) -> None:
        self._run = run

    @property
    def run_id(self) -> str:
        return self._run.session.origin.run_id

    def send(self, command: AnyCommand) -> None:
        self._run.session.control.send(command)

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        session = self._run.session
        if session.folder is None or session.observers.pump.journal is None:
            raise CursorError(
                f"run {self.run_id} has no journal, from which events are read outside of its own event loop; start"
                f" it with journal=True"
            )
        over = self._run.over.is_set
        return JournalEventStream(session.folder.journal_dir, session.origin.attempt, over, since, types)

    async def result(self) -> RunResult:
        __tracebackhide__ = True
        while not self._run.over.is_set():  # noqa: ASYNC110  # set by a thread of no event loop
            await anyio.sleep(_POLL_S)
        if self._run.error is not None:
            self._run.raise_error()
        assert self._run.result is not None
        return self._run.result


def handle_of(run: Background) -> Run:
    """Return the handle of a run that has started; once nothing refers to it, the run is stopped."""
    handle = Run(BackgroundConnection(run))
    weakref.finalize(handle, _stop_unreferenced, run).atexit = False
    return handle


def _stop_unreferenced(run: Background) -> None:
    if not run.over.is_set():
        name = run.session.origin.run_id
        logger.warning(f"run {name} is stopped, because nothing refers to it any more; keep what start() returns")
        run.stop("nothing refers to it any more")


def _stop_all() -> None:
    runs = list(_under_way)
    for run in runs:
        run.stop("the program ends")
    for run in runs:
        run.over.wait(_EXIT_S)


atexit.register(_stop_all)
