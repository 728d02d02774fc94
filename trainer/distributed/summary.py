"""What a rank shows of itself to the others: how long its steps take, and where its time goes."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from events.messages import RankReported, StallLedger
from events.origin import Origin
from events.ranks import MAX_METRICS
from trainer.distributed.exchange import ExchangeClock
from trainer.distributed.failure import Peers, RankSummary
from trainer.distributed.store_link import beat_s
from trainer.hooks.readback import DeviceReadback
from trainer.loop.ledger import Ledger, difference

_FIRST_S = 2.0
_EVERY_S = 10.0
_PER_S = 32
"""Maximum reports per second of all ranks together: they are in the journal."""
_AT_ONCE = 256
"""Maximum events per call."""
_ARRIVES_BEATS = 3.0
"""Signs of life after which the summaries of all ranks have arrived."""


def report_s(world_size: int) -> float:
    """Return the seconds between two reports of a rank."""
    return max(_EVERY_S, world_size / _PER_S)


class LoggedNumbers:
    """The means of the numbers that this rank has logged in training. On one thread."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._names: set[str] = set()

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        for name, value in metrics.items():
            if name not in self._names:
                if len(self._names) == MAX_METRICS:
                    continue  # see `RankReported.metrics`
                self._names.add(name)
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value, count + 1

    def take(self) -> dict[str, float]:
        """Return the means since the last call."""
        sums, self._sums = self._sums, {}
        return {name: total / count for name, (total, count) in sums.items()}


class RankReports:
    """Summarises this rank every few seconds, and on rank 0 the summaries of all become events. On one thread.

    Attributes:
        newest: The summary to send to rank 0.
    """

    def __init__(
        self,
        ledger: Ledger,
        exchange: ExchangeClock,
        readback: DeviceReadback,
        device: torch.device,
        world_size: int,
    ) -> None:
        self.newest: RankSummary | None = None
        self._ledger, self._exchange, self._device = ledger, exchange, device
        self._world_size = world_size
        self._due_s = time.monotonic() + _FIRST_S
        self._round_due_s = self._due_s + _ARRIVES_BEATS * beat_s(world_size)
        self._before = StallLedger(), (0, 0, 0)
        self._published: dict[int, int] = {}  # the number of the newest report, by rank
        self._round: Iterator[RankReported] = iter(())
        self._numbers = LoggedNumbers()
        readback.on_metrics = self._numbers.add

    def look(self) -> None:
        """Make a summary if one is due."""
        if time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + report_s(self._world_size)
        ledger, total = self._ledger.glance(), self._exchange.total
        spent, before = difference(ledger, self._before[0]), self._before[1]
        self._before, steps = (ledger, total), total[0] - before[0]
        self.newest = RankSummary(
            number=1 if self.newest is None else self.newest.number + 1,
            step_s=(total[1] - before[1]) / steps / 1e9 if steps else None,
            before_exchange_s=(total[2] - before[2]) / steps / 1e9 if steps else None,
            ledger=spent,
            memory_bytes=_resident_bytes(),
            device_memory_bytes=torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else None,
            metrics=self._numbers.take(),
        )

    def events(self, peers: Peers, origin: Origin) -> list[RankReported]:
        """Return the next reports of all ranks, by rank: some per call."""
        if time.monotonic() >= self._round_due_s:
            self._round_due_s = time.monotonic() + report_s(self._world_size)
            self._round = self._make_round(peers, origin)
        return list(itertools.islice(self._round, _AT_ONCE))

    def _make_round(self, peers: Peers, origin: Origin) -> Iterator[RankReported]:
        for rank, identity in enumerate(peers.identities):
            beat = peers.newest(rank)
            one = None if beat is None else beat.summary
            if beat is None or one is None or self._published.get(rank) == one.number:
                continue
            self._published[rank] = one.number
            yield RankReported(
                *origin.header(),
                reported_rank=rank,
                ranks=self._world_size,
                host=identity.host,
                phase=beat.phase,
                steps=one.ledger.steps,
                step_s=one.step_s,
                before_exchange_s=one.before_exchange_s,
                ledger=one.ledger,
                memory_bytes=one.memory_bytes,
                device_memory_bytes=one.device_memory_bytes,
                metrics=one.metrics,
            )


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
