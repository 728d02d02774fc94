"""What the agents keep in the process group's store: the log, requests, and signs of life.

    identity/R   where rank R runs                      log/N     entry N of the log, from 0
    beat/R       the newest sign of life of rank R      inbox     number of requests so far
    roster       where all ranks run                    inbox/N   request N, from 1, for rank 0

A key is only read once it exists, so that no call waits. Entries that all ranks have read are deleted.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any

import msgspec

from trainer.distributed.agreement import Entry, Failure, poll_s
from trainer.distributed.failure import Beat, Identity, LocalProcesses, Peers

STORE_TIMEOUT_S = 10.0
_BEAT_S = 0.5
_CHUNK = 1_024
"""Maximum keys per request."""

_entry = msgspec.json.Decoder(Entry)
_beat = msgspec.json.Decoder(Beat)
_identity = msgspec.json.Decoder(Identity)
_encode = msgspec.json.Encoder().encode


class Roster(msgspec.Struct, frozen=True):
    """The identities of all ranks, in little space: every rank reads it."""

    places: list[tuple[str, str]]
    """Hosts and their spaces..."""
    ranks: list[tuple[int, int]]
    """...the place of each rank among them, and its process."""

    @classmethod
    def of(cls, identities: list[Identity]) -> Roster:
        """Make it from the identities of all ranks."""
        places = list(dict.fromkeys((one.host, one.space) for one in identities))
        numbers = {place: number for number, place in enumerate(places)}
        return cls(places, [(numbers[one.host, one.space], one.pid) for one in identities])

    def identities(self) -> list[Identity]:
        """Return them."""
        return [Identity(self.places[place][0], pid, self.places[place][1]) for place, pid in self.ranks]


_roster = msgspec.json.Decoder(Roster)


def beat_s(world_size: int) -> float:
    """Return the seconds between two signs of life of a rank."""
    return max(_BEAT_S, poll_s(world_size))


class StoreLink:
    """One rank's traffic with the store. All methods run on one thread.

    Attributes:
        identity: Where this rank runs.
        peers: What is known of all ranks; None before all of them are there.
        read: Entries of the log that were read.
        exchanges: How often the agent has begun to do what is due.
        address: Of the store's server.
        peer_timeout_s: Seconds without a beat of any rank of a host, after which the host counts as lost.

    Args:
        store: A `torch.distributed.Store` with a prefix that no earlier life of the ranks has used.

    Raises:
        RuntimeError: The store is gone; `torch.distributed.DistError` is one.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, peer_timeout_s: float, collective_timeout_s: float
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.identity = Identity.here()
        self.peers: Peers | None = None
        self.read = 0
        server = store
        while hasattr(server, "underlying_store"):  # a prefix, of another perhaps
            server = server.underlying_store
        self.address = f"{getattr(server, 'host', '?')}:{getattr(server, 'port', '?')}"
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
        self.peer_timeout_s = max(peer_timeout_s, 4 * beat_s(world_size))
        self._collective_timeout_s = collective_timeout_s
        self.exchanges = 0
        self.looks: tuple[int, int] = (0, 0)  # of `Agent.watch_store`: their number since an exchange, and that
        self._processes: LocalProcesses | None = None
        self._received = 0  # of the inbox
        self._missing: list[int] = []  # numbers that are given to a sender, which has not written yet
        self._deleted = 0
        self._beat_due_s = 0.0
        self._store.set(f"identity/{rank}", _encode(self.identity))

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()

    # -------------------------------------------------------------------------------------------- the log

    def read_log(self) -> list[Entry]:
        entries = []
        while self._store.check([key := f"log/{self.read}"]):
            entries.append(_entry.decode(self._store.get(key)))
            self.read += 1
            if entries[-1].abort is not None:
                break
        return entries

    def append(self, entry: Entry) -> bool:
        """Append an entry of rank 0, which has read all before it; return whether none was appended meanwhile."""
        data = _encode(entry)
        if bytes(self._store.compare_set(f"log/{self.read}", "", data.decode())) != data:
            return False
        self.read += 1
        return True

    def append_abort(self, failure: Failure) -> None:
        """Append the end of the log, unless it has one."""
        data, number = _encode(Entry(abort=failure)), self.read
        while True:
            stored = bytes(self._store.compare_set(f"log/{number}", "", data.decode()))
            if stored == data or _entry.decode(stored).abort is not None:
                return
            number += 1

    # ------------------------------------------------------------------------------------------- commands

    def send(self, request: Entry) -> None:
        number = self._store.add("inbox", 1)
        self._store.set(f"inbox/{number}", _encode(request))

    def receive(self) -> list[Entry]:
        """Return what the other ranks have sent, on rank 0."""
        newest = self._store.add("inbox", 0)
        self._missing += range(self._received + 1, newest + 1)
        self._received = newest
        here = [number for number in self._missing if self._store.check([f"inbox/{number}"])]
        self._missing = [number for number in self._missing if number not in here]
        found = []
        for number in here:
            found.append(_entry.decode(self._store.get(f"inbox/{number}")))
            self._store.delete_key(f"inbox/{number}")
        return found

    # ------------------------------------------------------------------------------------- signs of life

    @property
    def is_beat_due(self) -> bool:
        return time.monotonic() >= self._beat_due_s

    def beat(self, beat: Beat) -> None:
        """Send a sign of life, and look at those of others: rank 0 at all, all at rank 0."""
        now_s = time.monotonic()
        self._beat_due_s = now_s + beat_s(self.world_size)
        self._store.set(f"beat/{self.rank}", _encode(beat))
        peers = self.peers
        if peers is None:
            self._find_peers()
            return
        self._hear([0] if self.rank else list(range(self.world_size)), now_s)
        for number in range(self._deleted, min(peers.read_by_all, self._deleted + _CHUNK)) if not self.rank else ():
            self._store.delete_key(f"log/{number}")
            self._deleted = number + 1

    def find_dead(self, timeout_s: float = 0.0) -> Failure | None:
        """Return the failure of a rank on this host whose process has died; wait for one until a timeout."""
        peers = self.peers
        for rank in self._processes.take_dead(timeout_s) if self._processes is not None else ():
            assert peers is not None
            with contextlib.suppress(RuntimeError):  # the store may be gone with it
                self._hear([rank], time.monotonic())
            if not peers.has_ended(rank):
                return peers.died(rank, f"its process {peers.identities[rank].pid} has died")
        return None

    def await_end(self, rank: int, timeout_s: float) -> None:
        """Wait until the process of a rank on this host has ended."""
        if self._processes is not None:
            self._processes.await_death(rank, timeout_s)

    def find_lost(self) -> Failure | None:
        """Return the failure of a rank that is cut off or hangs. Call it after `beat`."""
        peers, now_s = self.peers, time.monotonic()
        if peers is None:
            return None
        if self.rank == 0:
            return peers.silent(now_s, self.peer_timeout_s, range(1, self.world_size)) or peers.stalled(now_s)
        if peers.is_silent(0, now_s, self.peer_timeout_s):
            self._hear(peers.beside(0), now_s)
            return peers.silent(now_s, self.peer_timeout_s, [0])
        return None

    def _find_peers(self) -> None:
        """Meet the other ranks, once all are there: rank 0 lists them for all."""
        if self.rank == 0:
            keys = [f"{kind}/{rank}" for kind in ("identity", "beat") for rank in range(self.world_size)]
            if not self._store.check(keys):
                return
            identities = [_identity.decode(data) for data in self._get(keys[: self.world_size])]
            self._store.set("roster", _encode(Roster.of(identities)))
        elif self._store.check(["roster"]):
            identities = _roster.decode(self._store.get("roster")).identities()
        else:
            return
        self._processes = LocalProcesses(identities, self.rank)
        self.peers = Peers(identities, self._collective_timeout_s, time.monotonic())
        self._hear(list(range(self.world_size)) if self.rank == 0 else [0], time.monotonic())

    def _hear(self, ranks: list[int], now_s: float) -> None:
        assert self.peers is not None
        for rank, data in zip(ranks, self._get([f"beat/{rank}" for rank in ranks]), strict=True):
            self.peers.hear(rank, _beat.decode(data), now_s)

    def _get(self, keys: list[str]) -> list[bytes]:
        """Return the values of keys that exist."""
        chunks = [keys[start : start + _CHUNK] for start in range(0, len(keys), _CHUNK)]
        return [bytes(data) for chunk in chunks for data in self._store.multi_get(chunk)]
