"""Divide the batches of a dataloader among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from trainer.data.loaders import ShardedSampler, ShuffledSampler, batch_rows, loader_length, own_batches
from trainer.distributed.sharding import Shard, share_batches
from trainer.loop.boundary import Boundary
from trainer.loop.workers import Batches

Division = Literal["rows", "batches", "own"]
"""Who divides the data. ``rows``: the trainer's sampler, in blocks of one micro-batch. ``batches``: all ranks read the
same batches, and each computes its own. ``own``: the dataloader, which gives each rank batches of its own."""


def division_of(loader: Iterable[Any]) -> Division:
    """Return who divides the data of a dataloader."""
    sampled = own_batches(loader, ShuffledSampler) or own_batches(loader, ShardedSampler)
    if sampled is not None:
        return "rows"
    if isinstance(loader, list | tuple):
        return "batches"
    batches = getattr(loader, "batch_sampler", None)
    in_order = isinstance(loader, DataLoader) and type(getattr(batches, "sampler", None)) is SequentialSampler
    return "batches" if in_order else "own"


def divides_itself(loader: Any) -> bool:
    """Whether a dataloader certainly gives each rank batches of its own."""
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return any(isinstance(one, DistributedSampler | ShuffledSampler | ShardedSampler) for one in (sampler, inner))


def batches_of_rank(loader: Iterable[Any], division: Division, world_size: int) -> int | None:
    """Return the batches that each rank gets, dummies included; of this rank alone if the loader divides the data."""
    length = loader_length(loader)
    return -(-length // world_size) if division == "batches" and length is not None else length


class RankBatches(Batches):
    """Reads this rank's batches of a dataloader. On the loop's thread.

    Attributes:
        is_dummy: Whether this rank was short of a batch, so that the last one that was read is another's.
        shard: This rank's part.
        rows: Rows of all ranks' batches, if that is certain.

    Args:
        batch_size: Rows of a batch, if the loader does not say.
    """

    def __init__(self, boundary: Boundary, loader: Any, open_: Callable[[], Iterator[Any]], batch_size: int) -> None:
        division, world = division_of(loader), boundary.attempt.world
        self.shard = Shard(batch_rows(loader, batch_size), world.data_rank, world.data_size)
        self.rows: int | None = loader.sampler.rows if division == "rows" else None
        self.is_dummy = False
        skipped = getattr(getattr(loader, "sampler", None), "skip", 0) if division == "rows" else 0
        self._number = self.shard.rounds(skipped)  # of the next batch, from 0
        super().__init__(boundary, open_)
        shares = division == "batches"
        self._shared = share_batches(self._read_all(), world.data_rank, world.data_size) if shares else None

    def __next__(self) -> Any:
        if self._shared is not None:
            batch, self.is_dummy = next(self._shared)
            return batch
        batch = super().__next__()
        if self.rows is not None:
            self.is_dummy = not self.shard.rows_of(self.rows, self._number)
        self._number += 1
        return batch

    def _read_all(self) -> Iterator[Any]:
        while True:
            try:
                batch = super().__next__()
            except StopIteration:
                return
            yield batch
