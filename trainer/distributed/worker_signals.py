"""Dataloader workers that outlive the signals of a stop, so that their rank reads until the tick at which all stop.

torchrun, a terminal and schedulers signal a rank's whole process group, or each process of its host. In a single
process the loop stops where it finds the workers dead. A rank cannot: the others stop at a later tick.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

_STOPS = (signal.SIGINT, signal.SIGTERM)
_lock = threading.Lock()


@functools.cache
def _runs() -> Any:
    """The runs in this process whose workers ignore the signals of a stop, in memory that the workers share."""
    return RawValue(ctypes.c_int, 0)


def count_runs(change: int) -> None:
    """Add to the number of runs whose workers ignore SIGINT and SIGTERM. Without one these end workers. Any thread."""
    with _lock:
        _runs().value += change


class _Start:
    """Begins a worker: the ``worker_init_fn`` of a dataloader, before the user's own.

    Attributes:
        mask: The signals that the process which starts the worker blocks at other times.
    """

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.mask: set[Any] = set()
        self._own, self._runs = own, _runs()

    def __call__(self, number: int) -> None:
        for stop in _STOPS:
            if signal.getsignal(stop) is not signal.SIG_IGN:
                # Not SIG_IGN: programs that the data set starts would inherit it.
                signal.signal(stop, self._handle)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        if self._own is not None:
            self._own(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._runs.value:  # the run has ended, or this process's parent ends what is left
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def open_guarded(loader: Any, open_: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Begin to iterate over a dataloader; workers that torch's starts ignore the signals of a stop during runs."""
    if not isinstance(loader, DataLoader) or not loader.num_workers or not hasattr(signal, "pthread_sigmask"):
        return open_()
    # It stays in the dataloader, because an ``__iter__`` of its own may start the workers later.
    start = loader.worker_init_fn
    if not isinstance(start, _Start):
        loader.worker_init_fn = start = _Start(start)
    # A worker inherits the mask, and ends from no signal before it has set its handlers.
    start.mask = before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        return open_()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
