"""The log by which ranks agree on commands: any interleaving of its author, its readers and their loops."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.protocol import AnyCommand, Checkpoint, Pause, Resume, Stop
from trainer.distributed.agreement import Entry, Failure, Grant, LogAuthor, LogReader, look_ahead_s, poll_s

Taken = list[tuple[int, int, list[str]]]
FAILURE = Failure(1, "a", "ValueError: bad batch", "train_step", 7)


class Rank:
    """A rank's loop: it goes from tick to tick where the log lets it, and notes the decisions that it takes.

    Args:
        segments: The number of ticks in each.
    """

    def __init__(self, segments: list[int]) -> None:
        self.reader = LogReader()
        self.read = 0
        self.taken: Taken = []
        self.is_over = False
        self._segments = segments
        self._paused = False
        self._enter()

    def _enter(self) -> None:
        reader = self.reader
        while reader.tick == self._segments[reader.segment]:
            if reader.segment + 1 == len(self._segments):
                self.is_over = True
                return
            reader.segment, reader.tick = reader.segment + 1, 0
        reader.tick += 1

    @property
    def place(self) -> tuple[int, int]:
        return self.reader.segment, self.reader.tick

    def advance(self) -> bool:
        """Take the decisions that are due, and pass the tick if it is granted; return whether anything was done."""
        if self.is_over or self.reader.abort is not None:
            return False
        if not self._paused and self.reader.tick <= self.reader.free_until:  # the short way of the loop's thread
            self._enter()
            return True
        if (entry := self.reader.take(paused=self._paused)) is not None:
            self.taken.append((*self.place, [command.id for command in entry.commands]))
            for command in entry.commands:
                self._paused = isinstance(command, Pause) or (self._paused and not isinstance(command, Resume))
                self.is_over |= isinstance(command, Stop)
            self.is_over |= entry.failure is not None
            return True
        if self._paused or not self.reader.may_pass:
            return False
        self._enter()
        return True

    def catch_up(self, log: list[Entry], count: int) -> bool:
        entries = log[self.read : self.read + count]
        for entry in entries:
            self.reader.read(entry)
        self.read += len(entries)
        return bool(entries)


def run_interleaved(random: Random, ranks: list[Rank], kinds: str, commands: list[AnyCommand]) -> list[Entry]:
    """Run all ranks to their ends, one small action of one of them at a time; in segments of kind ``t`` a rank waits
    for the others in each tick, as a step's collective does.

    The author decides only when the others can do nothing more, or by chance.
    """
    log: list[Entry] = []
    author = LogAuthor(0.5)
    now, pending = 0.0, list(commands)

    def may_advance(rank: Rank) -> bool:
        return kinds[rank.reader.segment] == "v" or all(rank.place <= other.place or other.is_over for other in ranks)

    def act(rank: Rank) -> bool:
        if random.random() < 0.5:
            return rank.catch_up(log, random.randint(1, 3))
        return may_advance(rank) and rank.advance()

    def decide() -> bool:
        due = [pending.pop(0) for _ in range(min(len(pending), random.choice([0, 0, 1, 2])))]
        segment, tick = ranks[0].place
        entry = author.decide(now, kinds[segment], segment, tick, due)
        log.extend([entry] if entry is not None else [])
        return entry is not None

    while not all(rank.is_over for rank in ranks):
        now += random.choice([0.001, 0.1])
        if random.random() < 0.1:
            decide()
        if act(random.choice(ranks)):
            continue
        # Deadlocked unless someone can do something.
        acted = [rank.catch_up(log, 100) or (may_advance(rank) and rank.advance()) for rank in ranks]
        assert any(acted) or decide() or pending, "deadlock"
    return log


@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("tv"), st.integers(0, 30)), min_size=1, max_size=6),
    st.lists(st.sampled_from(["pause", "checkpoint", "stop"]), max_size=8),
)
@settings(deadline=None)
def test_all_ranks_take_the_same_decisions_at_the_same_tick(
    seed: int, world: int, segments: list[tuple[str, int]], what: list[str]
) -> None:
    """Whatever the interleaving: nobody deadlocks, and a decision has one place, or lies after the end for all."""
    commands: list[AnyCommand] = []
    for number, kind in enumerate(what):
        if kind == "pause":
            commands += [Pause(id=f"{number}"), Checkpoint(id=f"{number}c"), Resume(id=f"{number}r")]
        else:
            commands.append(Stop(id=f"{number}") if kind == "stop" else Checkpoint(id=f"{number}"))
    lengths = [max(1, length) if kind == "t" else length for kind, length in segments]
    ranks = [Rank(lengths) for _ in range(world)]
    log = run_interleaved(Random(seed), ranks, "".join(kind for kind, _ in segments), commands)
    assert all(rank.taken == ranks[0].taken for rank in ranks)
    decided = [command.id for entry in log for command in entry.commands]
    taken = [one for *_, ids in ranks[0].taken for one in ids]
    assert taken == decided[: len(taken)]
    stops = [command.id for command in commands if isinstance(command, Stop)]
    assert [one for one in decided if one in stops] in (stops[:1], [])


def test_an_entry_is_the_same_after_the_wire() -> None:
    entry = Entry(Grant(3, 40, 2), [Stop(id="s", reason="SIGTERM"), Checkpoint(id="c")], FAILURE)
    assert msgspec.json.decode(msgspec.json.encode(entry), type=Entry) == entry
    assert str(FAILURE) == "rank 1 on a in train_step after global_step 7: ValueError: bad batch"


def test_the_first_abort_ends_the_log() -> None:
    reader = LogReader()
    reader.read(Entry(Grant(0, 10, 2)))
    reader.tick = 3
    assert reader.free_until == 10
    reader.read(Entry(abort=FAILURE))
    reader.read(Entry(Grant(0, 99, 2), abort=Failure(2, "b", "later", "setup")))
    assert reader.abort is FAILURE
    assert reader.free_until == 0


def test_a_failure_is_taken_by_all_ranks_at_one_tick() -> None:
    author, reader = LogAuthor(0.5), LogReader()
    for entry in (author.decide(0.0, "train", 0, 1), author.decide(0.1, "train", 0, 2, failure=FAILURE)):
        assert entry is not None
        reader.read(entry)
    passed = []
    while (taken := reader.take()) is None:
        assert reader.may_pass
        passed.append(reader.tick)
        reader.tick += 1
    assert taken.failure == FAILURE
    assert passed == [0, 1, 2, 3]


@pytest.mark.parametrize("world", [2, 64, 1024, 4096])
def test_a_grant_never_lasts_longer_than_the_look_ahead(world: int) -> None:
    """A fast validation grants nothing of the slow training after it: a stop there has effect within the same time."""
    seconds, author = look_ahead_s(world), LogAuthor(look_ahead_s(world))
    assert poll_s(world) * 2 <= seconds
    step_s, batch_s, now, granted = 0.25, 0.001, 0.0, Grant()
    for segment, (kind, length_s, tick_s) in enumerate([("train", 60, step_s), ("val", 60, batch_s)] * 2):
        for tick in range(1, int(length_s / tick_s)):
            now += tick_s
            entry = author.decide(now, kind, segment, tick)
            granted = entry.grant if entry is not None else granted
            assert granted.until > tick  # rank 0 itself never waits
            assert (granted.until - tick) * tick_s <= 1.6 * max(seconds, 2 * tick_s)
        assert granted.ahead <= max(2, seconds / step_s)


def test_a_burst_of_ticks_is_not_granted_for_long() -> None:
    """The rate rises by halves and falls at once."""
    author = LogAuthor(0.5)
    ticks = [(0.0, 0), (1.0, 10), (1.3, 1_000), (2.3, 1_001)]
    granted = [author.decide(now, "train", 0, tick) for now, tick in ticks]
    assert [entry.grant.until - tick for entry, (_, tick) in zip(granted[:3], ticks, strict=False) if entry] == [
        2,
        5,
        827,
    ]
    assert granted[3] is None
    after = author.decide(5.0, "train", 0, 1_827)
    assert after is not None
    assert after.grant.until - 1_827 < 160
