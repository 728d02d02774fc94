"""The thread by which a rank takes part in the agreement: it polls the log, grants, sends commands and beats.

All of a rank's traffic with the store is on this thread, through a connection of its own. It never waits for a key,
because a thread inside the store's client at the end of the interpreter aborts the process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from events.protocol import AnyCommand
from events.tracebacks import describe
from trainer.distributed.agreement import Entry, Failure, LogAuthor, LogReader, look_ahead_s, poll_s
from trainer.distributed.failure import Beat, Peers, RankSummary, is_of_collective, peer_failed
from trainer.distributed.store_link import STORE_TIMEOUT_S, StoreLink, beat_s
from trainer.errors import PeerFailed

_FIRST_POLL_S = 0.005
"""Seconds until the first poll for a loop that waits; doubled for each further one."""
_ABORT_WAIT_S = 2.0
_DEATH_S = 0.5
"""Seconds from the end of a process's connections to the end of the process."""
SILENT_LOOKS = 60
"""At one in 0.25 s: longer than a poll of 4,096 ranks."""
_HURRIED_PEER_TIMEOUT_S = 3.0
_NAMING_S = 2.0
"""Seconds that a rank waits for the name of a lost rank beyond the time after which that counts as lost."""
_CULPRIT_WAIT_S = 3.0
_END_WAIT_S = 10.0
"""Maximum seconds that rank 0, whose process may hold the store, waits for the end of the others."""


def _store_gone(address: str, error: Exception) -> str:
    return f"the store at {address} is gone: {str(error).partition(chr(10))[0]}"


class Agent:
    """Agrees with the agents of the other ranks on what the loops do at which tick.

    Attributes:
        failure: Why the run ends at once, if it does.

    Args:
        store: A `torch.distributed.Store`, that of the process group, with a prefix that no earlier attempt has used.
        now: Returns what the loop does, and its ``global_step``. Any thread.
        summary: Returns the newest report of this rank. Any thread.
        peer_timeout_s: See `StoreLink`.
        collective_timeout_s: See `Peers`.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        now: Callable[[], tuple[str, int]],
        summary: Callable[[], RankSummary | None] = lambda: None,
        peer_timeout_s: float,
        collective_timeout_s: float,
    ) -> None:
        self.failure: Failure | None = None
        self.tick = self._free = 0  # read and written by the loop at every tick
        self._reader = LogReader()
        self._lock = threading.Lock()  # of the reader; no signal handler may take it
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # for the loop, while it waits
        self._loop_waits = False
        self._outbox: deque[Entry] = deque()  # requests
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._link = StoreLink(store, rank, world_size, peer_timeout_s, collective_timeout_s)
        self._shown = now, summary
        self._abort: Failure | None = None
        self._abort_sent = threading.Event()
        self._failed_at_tick = self._is_cut_off = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"stagecast-agent-{rank}", daemon=True)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self._link.rank

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Tell the other ranks that this one has ended, and end the thread. Waits for the store, if it answers."""
        self._closing = True
        self._wake.put(None)
        if self._thread.is_alive() and not self._is_cut_off:  # else the store's client returns when TCP gives up
            self._thread.join(STORE_TIMEOUT_S + _END_WAIT_S)

    # ----------------------------------------------------------------------------------- the loop's thread

    def reach(self, kind: str | None) -> bool:
        """Reach the next tick; return whether `next_decision` must be called until it returns None.

        Args:
            kind: Of its segment: another one than before starts a new segment.
        """
        if kind != self._reader.kind:
            self._enter(kind)
        self.tick = tick = self.tick + 1
        return tick > self._free

    def _enter(self, kind: str | None) -> None:
        with self._lock:
            self._reader.kind = kind
            self._reader.segment += 1
            self.tick = self._reader.tick = 0
            self._free = self._reader.free_until
        if self.rank == 0:
            self._wake.put(None)  # the others wait for a grant of this segment

    def next_decision(self, *, paused: bool = False) -> Entry | None:
        """Return the next decision to take at this tick; None: go on.

        WAIT: for a grant, or while paused for a decision. The wait ends with the death of the grants' author too.

        Raises:
            PeerFailed: A rank has failed, so that no further tick is reached.
        """
        while True:
            with self._lock:
                self._reader.tick = self.tick
                entry = self._reader.take(paused=paused)
                self._free = self._reader.free_until
                self.raise_if_failed()
                self._failed_at_tick = entry is not None and entry.failure is not None
                if entry is not None or (not paused and self._reader.may_pass):
                    self._loop_waits = False
                    return entry
                self._loop_waits = True
            self._wake.put(None)
            try:
                self._news.get(timeout=1.0)
            except queue.Empty:
                continue

    def raise_if_failed(self) -> None:
        """Raise `PeerFailed` if a rank has failed."""
        if self.failure is not None:
            raise peer_failed(self.failure)

    # ---------------------------------------------------------------------------------------- any thread

    def send(self, command: AnyCommand) -> None:
        """Propose a command. Also in a signal handler."""
        self._request(Entry(commands=[command]))

    def fail(self, error: BaseException, phase: str | None = None) -> None:
        """Propose that all ranks fail at one tick, this one with an exception. Also in a signal handler."""
        self._request(Entry(failure=self.failure_of(error, phase)))

    def _request(self, request: Entry) -> None:
        self._outbox.append(request)
        self._wake.put(None)

    def failure_of(self, error: BaseException, phase: str | None = None) -> Failure:
        """Return what an exception on this rank is to the others.

        Args:
            phase: What raised it; by default what the loop does.
        """
        doing, step = self._now()
        return Failure(self.rank, self._link.identity.host, describe(error), phase or doing, step)

    def abort(self, error: BaseException) -> None:
        """End the run at once on all ranks, because this one reaches no further tick.

        Waits a moment for the store, so that the others learn the name before their collectives fail.
        """
        self._abort = self.failure_of(error)
        self._wake.put(None)
        if self._thread.is_alive():
            self._abort_sent.wait(_ABORT_WAIT_S)

    def explain(self, error: BaseException) -> BaseException:
        """Return what has ended the loop, which has raised an exception: itself, or the failure of another rank.

        A collective fails because of another rank: its name is known within the time after which ranks count as lost.
        Any other exception ends the run on all ranks.
        """
        if isinstance(error, PeerFailed) or self._failed_at_tick:
            return error
        if is_of_collective(error):
            failure = self._wait_for_failure()
            if failure is not None:
                named = peer_failed(failure)
                named.__cause__ = error
                return named
        self.abort(error)
        return error

    def hurry(self) -> None:
        """Find out sooner which rank is lost, because the launcher will soon kill this one."""
        self._link.peer_timeout_s = min(self._link.peer_timeout_s, _HURRIED_PEER_TIMEOUT_S)

    def _wait_for_failure(self) -> Failure | None:
        """Wait until it is known which rank has failed."""
        began = time.monotonic()
        while self.failure is None and self._thread.is_alive():
            if time.monotonic() - began > self._link.peer_timeout_s + _NAMING_S:
                break
            self._wake.put(None)
            time.sleep(0.02)
        return self.failure

    def watch_store(self) -> None:
        """Fail if the store has not answered since the last `SILENT_LOOKS` calls, as when this host is cut off.

        Another thread calls it, regularly: its calls are counted instead of the time, because the interpreter's lock
        may be held.
        """
        link = self._link
        count, at = link.looks
        link.looks = count, _ = (count + 1 if link.exchanges == at else 0), link.exchanges
        if count >= SILENT_LOOKS and self.failure is None and self._thread.is_alive():
            self._is_cut_off = True
            why = f"the store at {link.address} does not answer"
            self._fail(Failure(self.rank, link.identity.host, why, *self._now()))

    @property
    def peers(self) -> Peers | None:
        """What is known of the ranks; None before all of them have started."""
        return self._link.peers

    # ----------------------------------------------------------------------------------------- its thread

    def _run(self) -> None:
        link, waited_s = self._link, _FIRST_POLL_S
        author = LogAuthor(look_ahead_s(link.world_size)) if self.rank == 0 else None
        try:
            while not self._closing and self.failure is None:
                period_s = poll_s(link.world_size)
                waited_s = min(2 * waited_s, period_s) if self._loop_waits else max(_FIRST_POLL_S, period_s / 10)
                self._sleep(waited_s if self._loop_waits else period_s)
                self._exchange(author)
            link.beat(self._beat(ended=True))
            if self.failure is None:
                if author is not None:
                    self._wait_for_others()
            elif self.failure.rank != self.rank:  # torchrun reports the process that ends first
                while not self._closing:
                    self._sleep(0.5)
                link.await_end(self.failure.rank, _CULPRIT_WAIT_S)
        except Exception as error:  # the thread's border: the store is gone, and with it the run
            if not self._closing:
                gone = Failure(self.rank, link.identity.host, _store_gone(link.address, error), *self._now())
                self._fail(self._abort or link.find_dead(_DEATH_S) or gone)  # the rank that serves it may have died
        finally:
            self._abort_sent.set()
            link.close()

    def _wait_for_others(self) -> None:
        deadline, link = time.monotonic() + _END_WAIT_S, self._link
        while link.peers is not None and not link.peers.all_ended and time.monotonic() < deadline:
            if link.find_dead() is not None:
                return
            self._sleep(min(0.1, beat_s(link.world_size)))
            link.beat(self._beat(ended=True))

    def _sleep(self, seconds: float) -> None:
        try:
            self._wake.get(timeout=seconds)
            while True:
                self._wake.get_nowait()
        except queue.Empty:
            return

    def _exchange(self, author: LogAuthor | None) -> None:
        """Do all that is due with the store."""
        link = self._link
        link.exchanges += 1
        failure = self._abort or link.find_dead()
        if failure is None and link.is_beat_due:
            link.beat(self._beat())
            failure = link.find_lost()
        if failure is not None:
            self._abort = failure
            link.append_abort(failure)
        requests = [self._outbox.popleft() for _ in range(len(self._outbox))]
        self._read(link.read_log())
        if self.failure is not None:
            return
        if author is None:
            for request in requests:
                link.send(request)
        else:
            requests += link.receive()
            commands = [command for one in requests for command in one.commands]
            failure = next((one.failure for one in requests if one.failure is not None), None)
            with self._lock:
                place = self._reader.kind, self._reader.segment, self.tick
            entry = author.decide(time.monotonic(), *place, commands, failure)
            if entry is not None and link.append(entry):
                self._read([entry])

    def _read(self, entries: list[Entry]) -> None:
        if not entries:
            return
        with self._lock:
            for entry in entries:
                self._reader.read(entry)
            self._reader.tick = self.tick
            self._free = self._reader.free_until
            abort, waits = self._reader.abort, self._loop_waits
        if abort is not None:
            self._fail(abort)
        elif waits:
            self._news.put(None)

    def _fail(self, failure: Failure) -> None:
        self.failure = self.failure or failure
        with self._lock:
            self._free = 0
        self._news.put(None)
        self._abort_sent.set()

    def _now(self) -> tuple[str, int]:
        return self._shown[0]()

    def _beat(self, *, ended: bool = False) -> Beat:
        phase, step = self._now()
        return Beat(
            time.monotonic_ns(), self._reader.segment, self.tick, phase, step, self._link.read, ended, self._shown[1]()
        )
