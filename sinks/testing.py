"""Test a sink of your own: events of a run that no one trained, and a check of the rules for sinks.

With pytest, or in any other program::

    def test_lines(tmp_path):
        file = tmp_path / "lines.txt"
        check_sink(Lines(str(file)), written=file.read_text, run_dir=tmp_path)

    def test_a_metric_is_one_line(tmp_path):
        file = tmp_path / "lines.txt"
        with opened(Lines(str(file))) as write:
            write([Story()(MetricsLogged, metrics={"accuracy": 0.5})])
        assert file.read_text() == "0 accuracy 0.5\\n"
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import threading
import typing
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from events.messages import (
    EVENT_TYPES,
    Event,
    HistogramLogged,
    MetricsLogged,
    RunEnded,
    RunResumed,
    RunStarted,
    StageName,
    StallLedger,
    TrainStepEnded,
)
from events.sink import RunInfo, Sink, delivery_of

E = TypeVar("E", bound=Event)


class Story:
    """Builds the events of a run with consistent headers. Its attributes are those of the next event.

    Args:
        run_id: The run's name.
    """

    def __init__(self, run_id: str = "demo") -> None:
        self.run_id = run_id
        self.time = 1_700_000_000.0
        self.attempt = 1
        self.seq = 0
        self.global_step = 0
        self.epoch = 0
        self.step_in_epoch = 0
        self.stage: StageName | None = "train"

    def __call__(self, event_type: type[E], **fields: Any) -> E:
        """Build the next event; ``fields`` are those that its type adds to the header."""
        self.seq += 1
        place = (self.time, 0, self.global_step, self.epoch, self.stage)
        return event_type(self.run_id, self.attempt, self.seq, *place, **fields)

    def started(self, **fields: Any) -> RunStarted:
        """Build the first event of an attempt."""
        return self(RunStarted, **{"module": "my_package.Net", "epochs": 3, "steps_per_epoch": 100} | fields)

    def steps(self, count: int, *, loss: float | None = 2.0, step_s: float = 0.1) -> list[TrainStepEnded]:
        """Build the ends of the next optimizer steps, ``step_s`` seconds apart."""
        ended = []
        for _ in range(count):
            self.time += step_s
            self.global_step += 1
            self.step_in_epoch += 1
            ended.append(self(TrainStepEnded, loss=loss, step_in_epoch=self.step_in_epoch, step_s=step_s))
        return ended

    def resumed(self, **fields: Any) -> list[Event]:
        """Build the first two events of the next attempt, which resumes at the current step."""
        checkpoint = f"step-{self.global_step}.a{self.attempt}"
        self.attempt += 1
        return [self.started(), self(RunResumed, **{"checkpoint": checkpoint, "after_seq": self.seq - 1} | fields)]

    def every_event(self) -> list[Event]:
        """Build one event of each type, with made-up fields; then numbers and names that sinks get wrong."""
        events: list[Event] = [self(kind, **_required(kind)) for kind in EVENT_TYPES if kind is not RunEnded]
        events += self.steps(1, loss=math.nan)
        events += self.steps(1, loss=None)
        events.append(
            self(MetricsLogged, metrics={"größe/日本": math.inf, "a\nb,\"c'": -math.inf, "": 0.0, "x" * 300: 1e308})
        )
        events.append(self(HistogramLogged, name="weights", low=-1.0, high=1.0, counts=[1.0, 0.0, 3.0]))
        return events


@contextmanager
def opened(
    sink: Sink, *, run_id: str = "demo", attempt: int = 1, run_dir: str | os.PathLike[str] | None = None
) -> Iterator[Callable[[Sequence[Event]], None]]:
    """Open a sink as a run does, and close it at the end of the block; yields its ``write``.

    Everything runs on the calling thread; ``async`` methods run in an event loop of asyncio that lives as long as the
    block. What the sink raises propagates.
    """
    bound = getattr(sink, "bound", None)
    described: Sink = sink if bound is None else bound()
    folder = None if run_dir is None else os.fspath(run_dir)
    with asyncio.Runner() as runner:
        writer = described.open(RunInfo(run_id, attempt=attempt, run_dir=folder))

        async def wait(result: Awaitable[object]) -> None:
            await result

        def finish(result: object) -> None:
            if inspect.isawaitable(result):
                runner.run(wait(result))

        try:
            yield lambda events: finish(writer.write(events))
        finally:
            finish(writer.close())


def check_sink(
    sink: Sink,
    *,
    written: Callable[[], object] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Check the rules that every sink keeps, with events of every type that its `Delivery` asks for.

    The sink accepts an empty batch, strange names, NaN and infinities; changes no event; ignores events that were
    delivered before, also to an earlier writer; adds those of a resumed run; leaves no thread that would hold the end
    of the process. A description that is a Struct, as the sink host needs, is equal after a trip through JSON.

    Args:
        written: Reads what the sink has written, as any value that can be compared; called while the sink is closed.
            None: whether repeated events are ignored is not checked.
        run_dir: The folder of the run.

    Raises:
        AssertionError: The sink breaks a rule. What the sink itself raises propagates.
    """
    assert isinstance(sink, Sink), f"{sink!r} has no method open(run)"
    _check_description(sink)
    wanted = delivery_of(sink).types
    threads = set(threading.enumerate())
    story = Story()

    def asked_for(events: Sequence[Event]) -> list[Event]:
        return [event for event in events if wanted is None or type(event) in wanted]

    def write(attempt: int, *batches: Sequence[Event]) -> object:
        with opened(sink, attempt=attempt, run_dir=run_dir) as deliver:
            for batch in batches:
                before = msgspec.msgpack.encode(batch)
                deliver(batch)
                assert msgspec.msgpack.encode(batch) == before, f"{sink!r} changes the events that it is given"
        return None if written is None else written()

    first = asked_for([story.started(), *story.every_event(), *story.steps(3)])
    once = write(1, [], first)
    assert write(1, first[: len(first) // 2], first, first) == once, f"{sink!r} writes repeated events again"
    rest = asked_for([*story.resumed(), *story.steps(3), story(RunEnded, status="finished")])
    twice = write(2, rest)
    assert written is None or not rest or twice != once, f"{sink!r} adds nothing when the run resumes"
    assert write(2, rest[1:], rest) == twice, f"{sink!r} writes repeated events of a resumed run again"
    left = [thread.name for thread in set(threading.enumerate()) - threads if not thread.daemon]
    assert not left, f"{sink!r} leaves threads: {left}"


def _check_description(sink: object) -> None:
    check = getattr(sink, "check", None)
    if check is not None:
        check()
    if isinstance(sink, msgspec.Struct):
        again = msgspec.json.decode(msgspec.json.encode(sink), type=type(sink))
        assert again == sink, f"{sink!r} is not equal after a trip through JSON, by which it reaches the sink host"


def _required(kind: type[Event]) -> dict[str, Any]:
    """Values for the required fields that an event type adds to the header."""
    known = {str: "text", int: 1, float: 1.0, list: [], dict: {"a": 1.0}, StallLedger: StallLedger()}
    return {
        field.name: next(
            (value for of, value in known.items() if of in (field.type, typing.get_origin(field.type))),
            (typing.get_args(field.type) or [1])[0] if typing.get_origin(field.type) is typing.Literal else 1,
        )
        for field in msgspec.structs.fields(kind)
        if field.required and field.name not in Event.__struct_fields__
    }
