"""The run of `Trainer.train`: the loop on the calling thread, the event loop on another, and signals that stop it."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

import anyio

from events.protocol import Stop
from trainer.loop.control import Control
from trainer.loop.workers import hold_deaths
from trainer.run.session import Session

_HURRIED_END_S = 5.0
"""Maximum seconds to wait for observers after a second signal."""
_CLOSING_S = 1.0
"""Maximum seconds to wait for the event loop to close after the run: an async sink that hangs may keep it open."""
_REPEATS_S = 3.0
"""Seconds after a first signal in which torchrun's copies of it arrive."""
_ENDED: Final = "ended"
_SECOND_SIGNAL: Final = "second signal"
_News = Session | BaseException | str


def run_here(make: Callable[[], Session], control: Control) -> Session:
    """Run the loop on this thread and the event loop on another, until both have ended.

    The session is made in the event loop, because this thread may already run one of another kind. A signal
    that arrives before it is made waits in ``control``.

    Returns:
        The session, which has ended. `Control.stopped_by` is the first signal that arrived.

    Raises:
        KeyboardInterrupt: a second signal arrived, a SIGINT. The observers had at most a moment to finish.
        SystemExit: the same, for a SIGTERM.
        BaseException: the session could not be made.
    """
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    claims = itertools.count()  # the first claim decides whether the session runs; `next` is atomic

    async def main() -> None:
        session = make()
        if next(claims) > 0:
            session.discard()
            return
        news.put(session)
        await session.serve()
        news.put(_ENDED)  # before the event loop closes, which waits for the tasks that an async sink has left

    def serve() -> None:
        try:
            anyio.run(main)
        except BaseException as error:  # the thread's border: raised on the calling thread
            news.put(error)
        finally:
            news.put(_ENDED)

    def interrupt(error: BaseException) -> None:
        control.interruption = error
        news.put(_SECOND_SIGNAL)
        if control.interruptible:
            # Only in the module's own code: elsewhere it would leave the run half ended.
            raise error

    thread = threading.Thread(target=serve, name="stagecast-events", daemon=True)
    with heed_signals(control, interrupt):
        thread.start()
        session = news.get()  # WAIT: a device or a folder is opened
        if session is _SECOND_SIGNAL and next(claims) == 0:
            assert control.interruption is not None
            raise control.interruption
        while not isinstance(session, Session):
            if isinstance(session, BaseException):
                raise session
            session = news.get()  # it was made at the same moment, and its loop ends at once
        session.loop.run()
        control.on_stop = session.leave_uploads
        _wait_for_observers(session, news, control)
        if control.interruption is not None:
            interrupted = session.loop.ending.error  # its traceback shows where the loop was
            raise interrupted if isinstance(interrupted, (KeyboardInterrupt, SystemExit)) else control.interruption
        thread.join(_CLOSING_S)
    return session


def _wait_for_observers(session: Session, news: queue.SimpleQueue[_News], control: Control) -> None:
    """Wait until the session has ended; a second signal leaves the observers a moment.

    Raises:
        BaseException: the event loop has failed.
    """
    deadline: float | None = None
    one: _News = ""
    while one is not _ENDED:
        if control.interruption is not None and deadline is None:
            session.hurry()
            deadline = time.monotonic() + _HURRIED_END_S
        try:
            one = news.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return  # an observer hangs
        if isinstance(one, BaseException):
            raise one


def interruptibly(function: Callable[[], None]) -> None:
    """Run a function on a thread of its own, so that a signal ends the wait for it, even deep in a library."""
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
def heed_signals(control: Control, on_second: Callable[[BaseException], None]) -> Iterator[None]:
    """On the main thread, let the first SIGINT or SIGTERM stop the run, and the second end it at once.

    Args:
        on_second: Called in the handler of the second signal and of each further one, with the exception that Python
            raises for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # A launcher passes on a signal that the terminal or the scheduler has sent to its whole group: each gets it twice.
    repeats_s = _REPEATS_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    first_s = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if control.stopped_by is not None and time.monotonic() - first_s < repeats_s:
            return
        if control.stopped_by is None:
            first_s = time.monotonic()
            control.stopped_by = name = signal.Signals(number).name
            if control.on_stop is not None:
                control.on_stop()
            else:
                control.send(Stop(id=f"signal-{name}", reason=name))
            control.end_wait()
            return
        on_second(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))

    # The process ignores some on purpose (`nohup`, a shell's background job): these stay ignored.
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        with hold_deaths(control, handle.__code__):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
