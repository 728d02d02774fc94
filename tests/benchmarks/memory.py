"""A million events through a stuck sink, for each overflow policy that does not hold the loop: memory and counts.

    python tests/benchmarks/memory.py [--events 1000000]

Resident memory is read when the sink is stuck and again after the last event; the stated bound is what the
subscription and the bus's ring may hold. Each policy runs in a process of its own, to start from the same memory.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import anyio
import psutil
from report import header

from events.bus.catch_up import WrittenJournal
from events.bus.pump import Pump
from events.bus.ring import Ring
from events.messages import MetricsLogged, TrainStepEnded
from events.origin import Origin
from events.sink import Delivery

_MIB = 2**20
_CAPACITY_BYTES = 16 * _MIB
# The ring holds 16,384 events, at about 1 KiB each with their tuple and the allocator's rounding.
_RING_BYTES = 16 * _MIB


async def measure(policy: Literal["latest", "drop_oldest", "catch_up"], events: int) -> str:
    """One policy; returns its row of the table."""
    process = psutil.Process()
    origin = Origin("benchmark")
    # The sink never asks for the events that are left to the journal, so no journal is written.
    pump = Pump(Ring(origin), journal=WrittenJournal(Path("journal"), lambda: False))
    subscription = pump.subscribe("stuck", Delivery(overflow=policy, capacity_bytes=_CAPACITY_BYTES))

    def publish() -> None:
        for step in range(1, events // 2 + 1):
            origin.global_step = step
            pump.ring.publish(TrainStepEnded(*origin.header(), 0.5, step, 32, 0.001, 0.1))
            pump.ring.publish(MetricsLogged(*origin.header(), {"accuracy": 0.5, "mae": 0.1}))
            if len(pump.ring._events) > 8_192:  # as fast as the pump can follow, so that the subscription gets them all
                gate.wait(0.001)

    gate = threading.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump.run)
        pump.ring.publish(TrainStepEnded(*origin.header()))
        await subscription.receive()  # the sink takes one event, and never asks again
        gc.collect()
        before = process.memory_info().rss
        thread = threading.Thread(target=publish)
        thread.start()
        peak = before
        while thread.is_alive():
            await anyio.sleep(0.05)
            peak = max(peak, process.memory_info().rss)
        await pump.drain()
        counts = subscription.statistics
        total = counts.delivered + counts.dropped + counts.conflated + counts.queued + pump.ring.counters.dropped
        published = events // 2 * 2 + 1
        row = (
            f"{policy:12}{(peak - before) / _MIB:10.1f}{(_CAPACITY_BYTES + _RING_BYTES) / _MIB:10.1f}"
            f"{counts.conflated:12,}{counts.dropped:12,}{counts.queued:12,}{pump.ring.counters.dropped:8,}"
            f"   {'add up' if total == published + counts_of_bus(pump) else f'{total:,} of {published:,}'}"
        )
        pump.close()
    subscription.discard()
    return row


def counts_of_bus(pump: Pump) -> int:
    """Events that the bus published about itself (`ObserverDropped`)."""
    return pump._next_seq - 1 - _published_by_user[0] + pump.ring.counters.dropped


_published_by_user = [0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--policy", choices=("latest", "drop_oldest", "catch_up"))
    options = parser.parse_args(arguments)
    _published_by_user[0] = options.events // 2 * 2 + 1
    if options.policy:
        print(anyio.run(measure, options.policy, options.events))
        return 0
    print(header())
    print(f"\n{options.events:,} events into a sink that never returns; memory in MiB above the start")
    print(f"{'policy':12}{'peak':>10}{'bound':>10}{'conflated':>12}{'dropped':>12}{'queued':>12}{'ring':>8}")
    for policy in ("latest", "drop_oldest", "catch_up"):
        command = [sys.executable, str(Path(__file__)), "--events", str(options.events), "--policy", policy]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
