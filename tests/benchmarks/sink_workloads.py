"""Sinks that misbehave, in a module that a sink host can import."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import msgspec

from events.messages import Event
from events.sink import RunInfo


class Burns(msgspec.Struct, frozen=True):
    """A sink with a thread that computes in Python all the time."""

    def open(self, run: RunInfo) -> Writer:
        threading.Thread(target=_burn, daemon=True).start()
        return Writer()


class Hangs(msgspec.Struct, frozen=True):
    """A sink that never returns from its first write."""

    def open(self, run: RunInfo) -> Writer:
        return Hanging()


class Writer:
    def write(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


class Hanging(Writer):
    def write(self, events: Sequence[Event]) -> None:
        threading.Event().wait()


def _burn() -> None:
    while True:
        sum(range(100))
