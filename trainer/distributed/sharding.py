"""Who computes which rows: the epoch's order, cut into blocks of one micro-batch. Pure functions, without torch.

Block ``j`` goes to rank ``j % world_size``, so a step of all ranks takes the same rows as a step of a single process.
In the last round of blocks some ranks may be short of one: they compute a *dummy*, a block that counts nothing, because
all ranks must do the same number of forward and backward passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Shard(NamedTuple):
    """One rank's part of an order of rows."""

    block: int
    """Rows of a micro-batch."""
    rank: int = 0
    world_size: int = 1

    def rounds(self, rows: int) -> int:
        """Return the blocks per rank, dummies included."""
        return -(-rows // (self.block * self.world_size))

    def length(self, rows: int) -> int:
        """Return the indices per epoch for this rank, those of a dummy included."""
        rounds = self.rounds(rows)
        if not rounds:
            return 0
        return (rounds - 1) * self.block + (self.rows_of(rows, rounds - 1) or min(self.block, rows))

    def rows_of(self, rows: int, number: int) -> int:
        """Return the rows of this rank's block of that number, from 0; 0 for a dummy."""
        return max(0, min(self.block, rows - (number * self.world_size + self.rank) * self.block))

    def rows_of_all(self, rows: int, first: int, blocks: int) -> int:
        """Return the rows of all ranks in that many consecutive blocks of each, from block ``first`` of each."""
        per_round = self.block * self.world_size
        return max(0, min(rows, (first + blocks) * per_round) - first * per_round)

    def take(self, order: Sequence[int]) -> list[int]:
        """Return this rank's part of an order; a dummy repeats the first block."""
        if self.world_size == 1:
            return list(order)
        block = self.block
        mine: list[int] = []
        for number in range(self.rounds(len(order))):
            start = (number * self.world_size + self.rank) * block
            mine += order[start : start + block] or order[:block]
        return mine


WHOLE = Shard(1)
"""The part of a single process: all of it."""


def share_batches(batches: Iterable[T], rank: int, world_size: int) -> Iterator[tuple[T, bool]]:
    """Yield this rank's batches of an iteration that is the same on all ranks, and whether each is a dummy.

    Every batch is read, and those of other ranks are discarded. A dummy repeats the first batch of its turn.
    """
    iterator = iter(batches)
    for first in iterator:  # each turn begins with rank 0's
        mine, is_dummy = first, rank > 0
        for number, batch in zip(range(1, world_size), iterator, strict=False):
            if number == rank:
                mine, is_dummy = batch, False
        yield mine, is_dummy


def seed_for(*parts: object) -> int:
    """Return a seed that these values determine, from 0 to 2**63 - 1."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
