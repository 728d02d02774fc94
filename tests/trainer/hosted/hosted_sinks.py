"""Sinks that a sink host imports: they record their events, and misbehave."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from events.log import logger
from events.messages import Event
from events.sink import Delivery, RunInfo


class Witness(msgspec.Struct, frozen=True):
    """Appends a line for each event: process, attempt, ``seq``, type, ``global_step``."""

    path: str
    behaviour: str = ""
    """``noisy``: prints. ``hangs``: its first write never returns. ``holds``: its first write stops all threads of its
    process. ``fails``: its first write in a process raises. ``dies``: ends its process in its third write, once.
    ``mortal``: ends its process whenever it is opened. ``burns``: one of its threads always computes. ``warns``: logs a
    warning when it is opened."""
    delivery: Delivery = Delivery(latency_s=0.02, batch=8, backoff_s=0.01)

    def open(self, run: RunInfo) -> WitnessWriter:
        if self.behaviour == "mortal":
            os._exit(3)
        if self.behaviour == "warns":
            logger.warning("by a process")
        if self.behaviour == "burns":
            threading.Thread(target=_burn, daemon=True).start()
        return WitnessWriter(self)


class WitnessWriter:
    def __init__(self, sink: Witness) -> None:
        self._sink = sink
        self._file = open(sink.path, "a")  # noqa: SIM115  # until it is closed
        self._writes = 0

    def write(self, events: Sequence[Event]) -> None:
        self._writes += 1
        behaviour = self._sink.behaviour
        if behaviour == "noisy":
            print("what a sink prints")
            print("and on stderr", file=sys.stderr)
            os.system("echo and what its processes print")
        if behaviour == "hangs":
            threading.Event().wait()
        if behaviour == "holds":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # one would end the sleep
            Path(f"{self._sink.path}.pid").write_text(str(os.getpid()))
            ctypes.PyDLL(None).sleep(100)  # type: ignore[attr-defined]  # unlike CDLL, it keeps the interpreter lock
        if behaviour == "fails" and self._writes == 1:
            raise OSError("the server is down")
        self._file.writelines(
            f"{os.getpid()} {event.attempt} {event.seq} {type(event).__name__} {event.global_step}\n"
            for event in events
        )
        self._file.flush()
        died = Path(f"{self._sink.path}.died")
        if behaviour == "dies" and self._writes == 3 and not died.exists():
            died.touch()
            print("about to die")
            os._exit(7)

    def close(self) -> None:
        self._file.write(f"{os.getpid()} closed\n")
        self._file.close()


class Unopenable(msgspec.Struct, frozen=True):
    """Cannot be opened."""

    delivery: Delivery = Delivery(on_error="fatal", backoff_s=0.01)

    def open(self, run: RunInfo) -> Any:
        raise ValueError("no such server")


def _burn() -> None:
    while True:
        sum(range(1000))
        time.sleep(0)
