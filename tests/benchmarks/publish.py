"""What `publish()` costs the loop's thread, with eight subscriptions, on asyncio and on trio.

    python tests/benchmarks/publish.py

Beside it what this machine needs for the least that could be done: to append the event to a deque, at the same pace.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns as clock

import anyio
from report import header, percentile

from events.bus.pump import Pump
from events.bus.ring import Ring
from events.bus.subscription import Subscription
from events.messages import TrainStepEnded
from events.origin import Origin
from events.sink import Delivery

_SUBSCRIPTIONS = 8


def _event(origin: Origin) -> TrainStepEnded:
    return TrainStepEnded(*origin.header(), 0.5, 1, 32, 0.001, 0.1)


def _busy_wait(until: int) -> None:
    while clock() < until:
        pass


class OnlyDeque:
    """What `Ring.publish` cannot go below."""

    def __init__(self) -> None:
        self._ring: deque[tuple[TrainStepEnded, None]] = deque(maxlen=1_000)

    def publish(self, event: TrainStepEnded) -> None:
        self._ring.append((event, None))


def paced(ring: Ring | OnlyDeque, origin: Origin, *, per_s: int, seconds: float) -> list[float]:
    """Publish at a pace; microseconds of each call."""
    costs: list[float] = []
    period = 1_000_000_000 // per_s
    due = clock()
    for _ in range(int(per_s * seconds)):
        due += period
        # A training step releases the interpreter lock all the time: so does this wait.
        while (left := due - clock()) > 60_000:
            time.sleep(left / 2e9)
        _busy_wait(due)
        event = _event(origin)
        begin = clock()
        ring.publish(event)
        costs.append((clock() - begin) / 1e3)
    return costs


def waking(ring: Ring, origin: Origin, *, count: int) -> list[float]:
    """Publish to a pump that sleeps; microseconds of each call."""
    costs: list[float] = []
    for _ in range(count):
        while not ring._sleeping:  # the benchmark may look: nothing public tells
            time.sleep(0.002)
        event = _event(origin)
        begin = clock()
        ring.publish(event)
        costs.append((clock() - begin) / 1e3)
    return costs


async def _measure(publisher: Callable[[Ring, Origin], list[float]], *, block: bool) -> list[float]:
    origin = Origin("benchmark")
    pump = Pump(Ring(origin))
    subscriptions = [pump.subscribe(f"s{i}", Delivery()) for i in range(_SUBSCRIPTIONS)]
    costs: list[float] = []

    def work() -> None:
        costs.extend(publisher(pump.ring, origin))
        pump.ring.post(pump.close)

    async def consume(subscription: Subscription) -> None:
        try:
            while True:
                await subscription.receive()
        except anyio.EndOfStream:
            return

    async def blocks() -> None:
        while pump.ring.alive and not pump.closing:
            time.sleep(0.1)  # noqa: ASYNC251 - the host misbehaves: that is what is measured
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump.run)
        for subscription in subscriptions:
            tasks.start_soon(consume, subscription)
        if block:
            tasks.start_soon(blocks)
        thread = threading.Thread(target=work)
        thread.start()
    thread.join()
    for subscription in subscriptions:
        subscription.discard()
    return costs


def main() -> int:
    print(header())
    print(f"\npublish() in microseconds, {_SUBSCRIPTIONS} subscriptions")
    print(f"{'':44}{'p50':>8}{'p99':>8}{'max':>9}   bar")
    cases: list[tuple[str, Callable[[Ring, Origin], list[float]], bool, str]] = [
        ("deque.append, 3,000/s", lambda b, o: paced(OnlyDeque(), o, per_s=3_000, seconds=5), False, ""),
        ("3,000 events/s", lambda b, o: paced(b, o, per_s=3_000, seconds=5), False, "p50 1, p99 10"),
        ("into a sleeping event loop", lambda b, o: waking(b, o, count=200), False, "p50 50"),
        ("event loop blocked 100 ms at a time", lambda b, o: paced(b, o, per_s=3_000, seconds=5), True, "max 1,000"),
    ]
    for backend in ("asyncio", "trio"):
        for name, publisher, block, bar in cases:
            costs = anyio.run(lambda p=publisher, b=block: _measure(p, block=b), backend=backend)
            row = f"{statistics.median(costs):8.2f}{percentile(costs, 99):8.2f}{max(costs):9.1f}"
            print(f"{backend + ', ' + name:44}{row}   {bar}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
