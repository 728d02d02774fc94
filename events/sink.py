"""The interface of a sink, and the delivery of events to an observer.

A sink is a plain description until it is opened, so that it can be stored, compared and sent to another process. A sink
in ten lines::

    class Lines(msgspec.Struct, frozen=True):
        path: str

        def open(self, run: RunInfo) -> "LinesWriter":
            return LinesWriter(open(self.path, "a"))

    class LinesWriter:
        def __init__(self, file): self.file = file
        def write(self, events): self.file.writelines(f"{event}\\n" for event in events)
        def close(self): self.file.close()
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Awaitable, Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import Meta

from events.errors import SinkMisconfigured
from events.messages import Event
from events.strict import Strict

Overflow = Literal["latest", "drop_oldest", "catch_up", "block"]
OnError = Literal["fatal", "disable", "retry"]
Place = Literal["thread", "process"]


class RunInfo(msgspec.Struct, frozen=True):
    """The run for which a sink is opened."""

    run_id: str
    attempt: int = 1
    rank: int = 0
    run_dir: str | None = None
    """The run's folder; None if the run keeps nothing on disk."""
    interactive: bool = False
    """Whether `Trainer.train` started the run in the main thread, so that a person probably watches."""


class SinkWriter(Protocol):
    """An open sink. Its methods are called one at a time.

    Plain methods run on a thread of the sink's own and may block; ``async`` methods run in the run's event loop
    (the host's, under `Trainer.run`) and must not.
    """

    def write(self, events: Sequence[Event], /) -> Awaitable[None] | None:
        """Write a batch of events, in order. If it raises, the error policy decides whether it is repeated.

        All observers share the events, and the dictionaries and lists in them: change only copies.
        """
        ...

    def close(self) -> Awaitable[None] | None:
        """Flush and close. Called once, after the last batch, also if the sink was disabled."""
        ...


@runtime_checkable
class Sink(Protocol):
    """The description of a sink. It may carry a class attribute or field ``delivery`` of type `Delivery`.

    It may also have a method ``check()``, which raises `SinkMisconfigured` for a problem that is visible without
    opening it: a client that is not installed (`events.sink.require`), or an invalid address. The trainer calls it when
    it is built, on the caller's thread; it must not wait.

    A method ``bound()`` returns the description to use. It is called when a run starts, on the thread that starts it,
    for state that only this thread has, such as the active run of a tracker.
    """

    def open(self, run: RunInfo, /) -> SinkWriter:
        """Build the writer; runs on the sink's own thread and may block. Import third-party clients here.

        `SinkMisconfigured` disables the sink; after any other exception it may be called again.
        """
        ...


class Delivery(Strict, frozen=True, kw_only=True):
    """How events reach one observer: their types, the limits of its queue, and the policies for overflow and errors."""

    types: frozenset[type[Event]] | None = None
    """The event types to deliver, exactly (no subclasses). None: all that the journal keeps; the others
    (`BackwardEnded`, `ValStepEnded`, `TestStepEnded`) are only built if an observer names them."""
    overflow: Overflow = "drop_oldest"
    """The policy for a full queue.

    ``latest``: the newest metric or step event of a key replaces the others. ``drop_oldest``: droppable events are
    dropped first, oldest first. ``catch_up``: lossless; the sink reads the events that do not fit from the run's
    journal, which it therefore needs. An event is only lost, and counted, if the journal could not keep it. ``block``:
    the training loop waits at its next step boundary; the ledger and `LoopHeld` report it.
    """
    capacity: Annotated[int, Meta(ge=1)] = 16_384
    """Maximum queued events, with the batch that is being delivered."""
    capacity_bytes: Annotated[int, Meta(ge=1)] = 64 * 2**20
    """Maximum queued bytes, with tensors; `Subscription` states the exact bound. The outputs of an epoch are one event:
    if they exceed this, they wait alone."""
    latency_s: Annotated[float, Meta(gt=0)] = 0.1
    """Maximum seconds for which an event waits for others of its batch. Each batch wakes threads that compete with the
    loop for the interpreter lock, so a lower value costs more."""
    batch: Annotated[int, Meta(ge=1)] = 1_024
    """Maximum events per delivery."""
    on_error: OnError = "retry"
    """``fatal``: the run stops at its next step and raises the observer's exception. ``disable``: the observer receives
    no more events. ``retry``: the batch is repeated after a growing pause, ``retries`` times, then ``disable``."""
    retries: Annotated[int, Meta(ge=0)] = 8
    backoff_s: Annotated[float, Meta(gt=0)] = 0.1
    """Seconds of the first pause; it doubles up to ``max_backoff_s``."""
    max_backoff_s: Annotated[float, Meta(gt=0)] = 30.0
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    """Maximum seconds per delivery, after which it counts as failed; None for no limit. Of a callback: per hook, which
    may take up to twice as long."""
    slow_s: Annotated[float, Meta(gt=0)] = 10.0
    """Seconds per delivery, or hook, after which `ObserverSlow` is published."""
    runs_in: Place | None = None
    """Of a sink: ``thread``, or ``process`` for the run's sink host, where it does not compete with the loop for the
    interpreter. There it reads the journal and misses nothing: ``overflow`` and ``capacity`` do not apply. None: the
    trainer's ``sinks_in``."""

    ranks: Literal["first", "all"] = "first"
    """Of a callback in a run of several ranks: where its hooks run that the loop does not wait for. ``first``: on rank
    0. ``all``: on each. Sinks are on rank 0."""

    def __post_init__(self) -> None:
        # A Struct's constructor does not validate; only decoding does.
        if not (self.types is None or (isinstance(self.types, frozenset) and all(map(_is_event_type, self.types)))):
            raise ValueError(f"Delivery(types={self.types!r:.200}): give a frozenset of event types, or None for all")
        for field in _checked_fields():
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise ValueError(f"Delivery({field.name}={value!r:.80}): {error}") from None


def _is_event_type(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Event)


@functools.cache
def _checked_fields() -> tuple[msgspec.structs.FieldInfo, ...]:
    return tuple(field for field in msgspec.structs.fields(Delivery) if field.name != "types")


SINK_DELIVERY = Delivery(timeout_s=30.0)
"""The default of sinks."""

CALLBACK_DELIVERY = Delivery(overflow="block", capacity=4_096, capacity_bytes=256 * 2**20, on_error="fatal")
"""The default of callbacks: every hook once, in order."""


def require(module: str, extra: str, user: str) -> None:
    """Check that a third-party client is installed, without importing it.

    Args:
        module: The client's top-level module.
        extra: The extra of stagecast that installs it.
        user: The part that needs it, for the message.

    Raises:
        SinkMisconfigured: It is not installed; the message has the command.
    """
    if importlib.util.find_spec(module) is None:
        raise SinkMisconfigured(f"{user} needs the package {module}: pip install 'stagecast[{extra}]'")


def delivery_of(sink: object) -> Delivery:
    """Return the delivery that a sink declares, or the default of all sinks."""
    delivery = getattr(sink, "delivery", None)
    return delivery if isinstance(delivery, Delivery) else SINK_DELIVERY
