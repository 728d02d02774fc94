"""What an observer implements, and how events are delivered to it.

A sink is a plain description until it is opened, so that it can be stored, compared and sent to another process. Ten
lines are a sink::

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
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import Meta

from events.errors import SinkMisconfigured
from events.messages import Event
from events.strict import Strict

Overflow = Literal["latest", "drop_oldest", "catch_up", "block"]
OnError = Literal["fatal", "disable", "retry"]
Place = Literal["thread", "process"]


class RunInfo(msgspec.Struct, frozen=True):
    """What a sink is told about the run when it is opened."""

    run_id: str
    attempt: int = 1
    rank: int = 0
    run_dir: str | None = None
    """The run's folder; None when the run keeps nothing on disk."""
    interactive: bool = False
    """Whether the run was started by `Trainer.train` in the main thread: a person is likely to be watching."""


class SinkWriter(Protocol):
    """An open sink. Its methods are called one at a time, never at once.

    Plain methods run on a thread of the sink's own and may block; ``async`` methods run in the run's event loop
    (the host's, under `Trainer.run`) and must not.
    """

    def write(self, events: Sequence[Event], /) -> Awaitable[None] | None:
        """Take a batch of events, in order. Raise to have the batch delivered again, as the error policy says.

        The events are everybody's, and so are dictionaries and lists in them: copy what you want to change.
        """
        ...

    def close(self) -> Awaitable[None] | None:
        """Flush and let go. Called once, after the last batch, also when the sink was disabled."""
        ...


@runtime_checkable
class Sink(Protocol):
    """The description of a sink. It may carry a class attribute or field ``delivery`` of type `Delivery`.

    It may also have a method ``check()``, which raises `SinkMisconfigured` for what can be seen without opening it: a
    client that is not installed (`events.sink.require`), an address that is none. The trainer calls it when it is
    built, on the caller's thread; it waits for nothing.

    And a method ``bound()``, which returns the description to use: called when a run starts, on the thread that starts
    it, for what only that thread knows, such as a tracker's run that it has active.
    """

    def open(self, run: RunInfo, /) -> SinkWriter:
        """Build the writer; runs on the sink's own thread and may block. Import third-party clients here.

        It may be called again after it has raised, except `SinkMisconfigured`, which disables the sink.
        """
        ...


class Delivery(Strict, frozen=True, kw_only=True):
    """How events reach one observer: which, how many may wait, what happens beyond that, and what if it fails."""

    types: frozenset[type[Event]] | None = None
    """The event types to deliver, exactly (no subclasses). None: all that the journal keeps; the others
    (`BackwardEnded`, `ValStepEnded`, `TestStepEnded`) are built only for those who name them."""
    overflow: Overflow = "drop_oldest"
    """What happens when the queue is full.

    ``latest``: metrics and step events are replaced by the newest of their key. ``drop_oldest``: droppable events go
    first, oldest first. ``catch_up``: lossless; the sink reads the events that do not fit from the run's journal, which
    it therefore needs. An event is only lost, and counted, if the journal could not keep it. ``block``: the training
    loop waits at its next step boundary; charged to the ledger and announced.
    """
    capacity: Annotated[int, Meta(ge=1)] = 16_384
    """Events that may wait, the batch being delivered included."""
    capacity_bytes: Annotated[int, Meta(ge=1)] = 64 * 2**20
    """Bytes that may wait, tensors included. A stated bound: see `Subscription`. The outputs of an epoch are one event:
    where they are more than this, they wait alone."""
    latency_s: Annotated[float, Meta(gt=0)] = 0.1
    """How long an event may be kept back to make a batch while many are published. Each batch wakes threads that
    compete with the loop for the interpreter lock, so less costs more."""
    batch: Annotated[int, Meta(ge=1)] = 1_024
    """Most events in one delivery."""
    on_error: OnError = "retry"
    """``fatal``: the run stops at its next step and raises the observer's exception. ``disable``: the observer gets
    nothing more. ``retry``: the batch is delivered again after a growing pause, ``retries`` times, then ``disable``."""
    retries: Annotated[int, Meta(ge=0)] = 8
    backoff_s: Annotated[float, Meta(gt=0)] = 0.1
    """First pause; it doubles up to ``max_backoff_s``."""
    max_backoff_s: Annotated[float, Meta(gt=0)] = 30.0
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    """How long one delivery may take before it counts as failed; None for as long as it likes. Of a callback: one hook,
    which may have up to twice as long."""
    slow_s: Annotated[float, Meta(gt=0)] = 10.0
    """How long one delivery, or hook, may take before `ObserverSlow` says so."""
    runs_in: Place | None = None
    """Of a sink: ``thread``, or ``process`` for the run's sink host, where it competes with nobody for the interpreter
    and reads the journal, so that it misses nothing: ``overflow`` and ``capacity`` do not apply there. None: the
    trainer's ``sinks_in``."""

    def __post_init__(self) -> None:
        # A Struct's constructor takes anything; only decoding would validate.
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
"""What a sink gets that names nothing else."""

CALLBACK_DELIVERY = Delivery(overflow="block", capacity=4_096, capacity_bytes=256 * 2**20, on_error="fatal")
"""What a callback gets that names nothing else: every hook once, in order."""


def require(module: str, extra: str, user: str) -> None:
    """See that a third-party client is installed, without importing it.

    Args:
        module: The client's top-level module.
        extra: Which of stagecast's extras installs it.
        user: Who needs it, for the message.

    Raises:
        SinkMisconfigured: It is not; says what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise SinkMisconfigured(f"{user} needs the package {module}: pip install 'stagecast[{extra}]'")


def delivery_of(sink: Any) -> Delivery:
    """The delivery that a sink asks for, or the default of all sinks."""
    delivery = getattr(sink, "delivery", None)
    return delivery if isinstance(delivery, Delivery) else SINK_DELIVERY
