"""A run on the calling thread, as `Trainer.train` does it: the event loop is on another, and signals stop it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import anyio

from events.protocol import Stop
from trainer.control import Control
from trainer.session import Session

_HURRIED_END_S = 5.0
"""How long it waits, after a second signal, for observers that were told to be quick."""
_CLOSING_S = 1.0
"""How long it waits for its event loop to close, once the run is over: an async sink that hangs may keep it open."""


def run_here(make: Callable[[], Session], control: Control) -> Session:
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
    with heed_signals(control):
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


def interruptibly(function: Callable[[], None]) -> None:
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
def heed_signals(control: Control) -> Iterator[None]:
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
