"""Which rank failed: judged by what all ranks show of themselves. Without clock, thread or store."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from events.messages import StallLedger
from trainer.distributed.agreement import Failure
from trainer.errors import PeerFailed


def peer_failed(failure: Failure) -> PeerFailed:
    """Return the exception of the other ranks."""
    return PeerFailed(str(failure), rank=failure.rank, host=failure.host, phase=failure.phase)


_OF_COLLECTIVE = re.compile(r"gloo|nccl|ProcessGroup|Connection (closed|reset) by peer|c10d", re.IGNORECASE)


def is_of_collective(error: BaseException) -> bool:
    """Whether an exception may be that of a collective, which another rank has not completed."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or (isinstance(error, RuntimeError) and bool(_OF_COLLECTIVE.search(str(error))))


class Identity(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    host: str
    pid: int
    space: str
    """Ranks with the same one see each other's processes. Empty: unknown."""

    @classmethod
    def here(cls) -> Identity:
        """Return that of this process."""
        space = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
        return cls(socket.gethostname(), os.getpid(), space)


class RankSummary(msgspec.Struct, frozen=True, array_like=True):
    """A report of a rank. See `events.messages.RankReported`."""

    number: int
    """Rises with each report of the rank."""
    step_s: float | None
    before_exchange_s: float | None
    ledger: StallLedger
    memory_bytes: int | None
    device_memory_bytes: int | None
    metrics: dict[str, float] = {}


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life of a rank."""

    number: int
    """Rises with each beat."""
    segment: int
    tick: int
    phase: str
    global_step: int
    read: int = 0
    """Entries of the log that the rank has read."""
    ended: bool = False
    """Whether its loop has ended; it then sends no further beat."""
    summary: RankSummary | None = None
    """Its newest report."""

    @property
    def place(self) -> tuple[int, int, str]:
        """What changes while the rank makes progress."""
        return self.segment, self.tick, self.phase


class Peers:
    """What is known of the other ranks.

    Args:
        identities: Of all ranks, by number.
        collective_timeout_s: Seconds without progress of any rank, after which one of them counts as hanging.
    """

    def __init__(self, identities: list[Identity], collective_timeout_s: float, now_s: float) -> None:
        self.identities = identities
        self._collective_timeout_s = collective_timeout_s
        self._beats: dict[int, Beat] = {}
        self._heard_s = dict.fromkeys(range(len(identities)), now_s)
        self._moved_s = now_s

    def beside(self, rank: int) -> list[int]:
        """Return the ranks on the host of one."""
        host = self.identities[rank].host
        return [other for other, one in enumerate(self.identities) if one.host == host]

    def is_silent(self, rank: int, now_s: float, timeout_s: float) -> bool:
        """Whether the rank itself sends no sign of life."""
        return now_s - self._heard_s[rank] > timeout_s and not self.has_ended(rank)

    def hear(self, rank: int, beat: Beat, now_s: float) -> None:
        """Note the newest beat of a rank."""
        before = self._beats.get(rank)
        if before is None or beat.number != before.number:
            self._beats[rank], self._heard_s[rank] = beat, now_s
        if before is None or beat.place != before.place:
            self._moved_s = now_s

    def newest(self, rank: int) -> Beat | None:
        """Return the newest beat of a rank; None before the first. Any thread."""
        return self._beats.get(rank)

    @property
    def read_by_all(self) -> int:
        """The entries of the log that every rank has read."""
        return min((beat.read for beat in self._beats.values()), default=0) if self._is_complete else 0

    @property
    def all_ended(self) -> bool:
        """Whether the loops of all ranks have ended."""
        return self._is_complete and all(beat.ended for beat in self._beats.values())

    @property
    def _is_complete(self) -> bool:
        return len(self._beats) == len(self.identities)

    def died(self, rank: int, why: str) -> Failure:
        """Return the failure of a rank that has left without a word."""
        beat = self._beats.get(rank)
        phase, step = (beat.phase, beat.global_step) if beat is not None else ("setup", 0)
        return Failure(rank, self.identities[rank].host, why, phase, step, is_observed=True)

    def silent(self, now_s: float, timeout_s: float, ranks: Iterable[int]) -> Failure | None:
        """Return the failure of the first of some ranks whose whole host sends no sign of life.

        A rank that is silent beside others that are not is stopped, or holds the interpreter's lock: its neighbours
        would see its process die. It counts as hanging only.

        Args:
            timeout_s: The silence of a host that counts.
            ranks: Those to judge: the newest beats of all of their hosts were heard.
        """
        heard_s: dict[str, float] = {}
        for rank, one in enumerate(self.identities):
            if not self.has_ended(rank):
                heard_s[one.host] = max(heard_s.get(one.host, 0.0), self._heard_s[rank])
        for rank in ranks:
            silent_s = now_s - heard_s.get(self.identities[rank].host, now_s)
            if silent_s > timeout_s and not self.has_ended(rank):
                return self.died(rank, f"no sign of life for {silent_s:.1f} s (peer_timeout_s={timeout_s:g})")
        return None

    def stalled(self, now_s: float) -> Failure | None:
        """Return the failure of the rank that holds the others up, if no rank makes progress.

        It is the one at the lowest tick; of several, the one that does something else than most. Ranks that all do the
        same compute: their collectives have a timeout of their own.
        """
        stalled_s = now_s - self._moved_s
        left = {rank: beat for rank, beat in self._beats.items() if not beat.ended}
        if stalled_s <= self._collective_timeout_s or len({beat.place for beat in left.values()}) < 2:
            return None
        lowest = min(beat.place[:2] for beat in left.values())
        behind = [rank for rank, beat in left.items() if beat.place[:2] == lowest]
        doing = Counter(beat.phase for beat in left.values())
        # With equally many, the one that is not in a collective.
        culprit = min(behind, key=lambda rank: (doing[left[rank].phase], left[rank].phase in COLLECTIVE_PHASES, rank))
        limit = f"collective_timeout_s={self._collective_timeout_s:g}"
        return self.died(culprit, f"no progress for {stalled_s:.0f} s ({limit}) while others wait for it")

    def has_ended(self, rank: int) -> bool:
        """Whether the loop of a rank has ended."""
        beat = self._beats.get(rank)
        return beat is not None and beat.ended


WAITING = "waiting for the other ranks"
COLLECTIVE_PHASES = ("backward", "the optimizer step", WAITING)
"""Phases in which a rank waits for others."""


_LAUNCHER_LOOKS_S = 0.3
"""Seconds within which torchrun, which looks every 0.1 s, has seen the end of a process."""


class LocalProcesses:
    """The processes of the other ranks on this host: their deaths are seen at once, even before they are reaped.

    Args:
        identities: Of all ranks, by number.
        own: The number of this one.
    """

    def __init__(self, identities: list[Identity], own: int) -> None:
        self._ranks: dict[int, int] = {}  # by the descriptor of the process
        self._poll = select.poll() if hasattr(os, "pidfd_open") else None
        self._gone: list[int] = []
        space = identities[own].space
        if self._poll is None or not space:
            return
        for rank, one in enumerate(identities):
            if one.pid == identities[own].pid or one.space != space:
                continue
            try:
                descriptor = os.pidfd_open(one.pid)
            except ProcessLookupError:
                self._gone.append(rank)
                continue
            except OSError:  # forbidden, or an old kernel: heartbeats remain
                continue
            self._ranks[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def take_dead(self, timeout_s: float = 0.0) -> list[int]:
        """Return the ranks whose processes have died since the last call; wait for one until a timeout."""
        dead, self._gone = self._gone, []
        if self._poll is not None and self._ranks:
            for descriptor, _ in self._poll.poll(timeout_s * 1_000):
                self._poll.unregister(descriptor)
                os.close(descriptor)
                dead.append(self._ranks.pop(descriptor))
        return dead

    def await_death(self, rank: int, timeout_s: float) -> None:
        """Wait until the process of a rank has died, if it is on this host, and its launcher has seen it."""
        for descriptor, other in self._ranks.items():
            if other == rank:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                if poll.poll(timeout_s * 1000):
                    time.sleep(_LAUNCHER_LOOKS_S)

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self._ranks:
            os.close(descriptor)
        self._ranks.clear()
