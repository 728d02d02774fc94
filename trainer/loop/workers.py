"""The death of dataloader workers: deaths that a stop explains, and their report to the loop.

A signal to a whole process group, as systemd, Slurm and ``kill -TERM -- -PGID`` send it, ends the workers with the
run. torch would raise its error from a SIGCHLD handler wherever the main thread is, in an optimizer's step for example.
During a run the error waits until the loop reads data, which it does only where it can stop.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch._C import _error_if_any_worker_fails
from torch.utils.data._utils import signal_handling

from events.log import logger
from events.tracebacks import chain_of
from trainer.distributed.worker_signals import open_guarded
from trainer.loop.boundary import Boundary
from trainer.loop.control import Control

_T = TypeVar("_T")
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:exited unexpectedly|is killed by signal)")
_KILLED = re.compile(r"is killed by signal: ([^.]+)\.")
_BY_A_STOP = {signal.strsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
_SIGNAL_WAIT_S = 1.0
"""Seconds to wait for the signal or command that explains a death: workers may receive a signal first."""
_DEATH_WAIT_S = 0.2
"""Seconds to wait for a worker's death after an error of a broken connection."""


@contextlib.contextmanager
def hold_deaths(control: Control, within: CodeType) -> Iterator[None]:
    """On the main thread: keep the death of a worker for the loop's next read of data (`Batches`), where torch would
    raise it in whatever the thread is doing.

    Args:
        within: The code of a signal handler that this one may interrupt; that one calls `Control.end_wait` itself.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if before is None or before is signal.SIG_IGN:  # a handler that Python does not know, or no handler
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        while True:  # one call finds the dead workers of one dataloader
            try:
                _error_if_any_worker_fails()
                break
            except RuntimeError as error:
                control.dead_worker = control.dead_worker or str(error)
        if callable(before):
            before(number, frame)
        if not _is_within(frame, within):  # an exception here would interrupt it, and the signal would be lost
            control.end_wait()

    # torch sets its handler with the first workers of a process, and would set it before this one.
    is_set, signal_handling._SIGCHLD_handler_set = signal_handling._SIGCHLD_handler_set, True
    signal.signal(signal.SIGCHLD, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is handle:
            signal.signal(signal.SIGCHLD, before)
        signal_handling._SIGCHLD_handler_set = is_set


def _is_within(frame: FrameType | None, code: CodeType) -> bool:
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


class Batches:
    """Iterates over a dataloader on the loop's thread; handles the stop that killed its workers.

    Args:
        open_: Begins to iterate over the dataloader.
        loader: The dataloader.

    Raises:
        StopRequested: a stop was taken, as `Boundary.take_commands` does.
    """

    def __init__(self, boundary: Boundary, open_: Callable[[], Iterator[Any]], loader: Any) -> None:
        self._boundary = boundary
        # The handler runs on the main thread: on another, torch ends the wait for a dead worker, within 5 s.
        self._on_main = threading.current_thread() is threading.main_thread()
        self.is_ahead = False
        """Whether the dataloader counts batches that no finished step has used, so that no checkpoint can be taken."""
        guarded = boundary.attempt.control.agent is not None  # the ranks stop together, and not where a worker dies
        self.source = self._read(functools.partial(open_guarded, loader, open_) if guarded else open_)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        return self._read(self.source.__next__)

    def _read(self, function: Callable[[], _T]) -> _T:
        control = self._boundary.attempt.control
        try:
            if control.dead_worker is not None:  # torch might wait for the rest of a dead worker's message
                raise RuntimeError(control.dead_worker)
            control.reading = self._on_main
            return function()
        except StopIteration:
            raise
        except Exception as error:
            control.reading = False
            death = take_stop_of_dead_workers(self._boundary, error, checkpoint=not self.is_ahead)
            if death is not None and str(error) != death:  # the reset connection to it, for example
                raise RuntimeError(death) from error
            raise
        finally:
            control.reading = False


def take_stop_of_dead_workers(boundary: Boundary, error: Exception, *, checkpoint: bool) -> str | None:
    """Handle the stop or cancellation that explains the death of a worker.

    Returns:
        What torch reports about the death, if neither came; None if the error is another one.

    Args:
        checkpoint: Whether the loop is where a checkpoint can be taken.

    Raises:
        StopRequested: a stop was taken.
        BaseException: the run was cancelled, or a fatal observer failed.
    """
    control = boundary.attempt.control
    text = _death(control, error)
    if text is None or ((killed := _KILLED.search(text)) is not None and killed[1] not in _BY_A_STOP):
        return text
    deadline = time.monotonic() + _SIGNAL_WAIT_S
    while not control.ends_run and (left_s := deadline - time.monotonic()) > 0:
        control.wait(left_s)
    if not control.ends_run:
        return text
    if not checkpoint and boundary.checkpoints.enabled:
        phase, step = boundary.attempt.phase, boundary.attempt.origin.global_step
        logger.warning(
            f"a dataloader's workers died in {phase} after global_step {step}, so the run stops without a checkpoint of"
            f" that step; resume from the one before"
        )
    boundary.take_commands(checkpoint=checkpoint)
    return text


def _death(control: Control, error: Exception) -> str | None:
    """Return torch's message about the dead worker behind an error; None without one."""
    for one in chain_of(error):
        if type(one) is RuntimeError and _DEATH.search(str(one)):
            return control.dead_worker or str(one)
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError):  # shared memory of the worker
        deadline = time.monotonic() + _DEATH_WAIT_S
        while control.dead_worker is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return control.dead_worker
    return None
