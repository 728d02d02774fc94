"""Divide the batches of a dataloader among the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from events.log import logger
from trainer.data.loaders import ShardedSampler, ShuffledSampler, batch_rows, loader_length, own_batches
from trainer.data.tensors import map_tensors
from trainer.distributed.sharding import Shard, share_batches
from trainer.distributed.world import World
from trainer.loop.boundary import Boundary
from trainer.loop.workers import Batches

_COMPARED = 4_096
"""Maximum numbers of a tensor that are compared."""

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


def reads_all(loader: Any) -> bool:
    """Whether each rank reads all of a data set, in an order of its own sampler."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    divides = any(isinstance(one, DistributedSampler | ShuffledSampler | ShardedSampler) for one in samplers)
    return division_of(loader) == "own" and not divides and samplers[1] is not None


def warn_of_same(world: World, batch: Any, method: str) -> None:
    """Warn if ranks that read data of their own have begun with the same batch. WAIT: for all ranks."""
    found = [one for one in world.gather(_digest(batch)) if one is not None]
    if world.leads and len(set(found)) < len(found):
        logger.warning(
            f"{method} gives several ranks the same data; divide it by the rank, which the environment variables RANK"
            f" and WORLD_SIZE hold"
        )


def _digest(batch: Any) -> str | None:
    """Identify a batch by its host tensors; None if it has none."""
    digest, count = hashlib.blake2b(digest_size=16), 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        if tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested:
            digest.update(repr(tensor.detach().reshape(-1)[:_COMPARED].tolist()).encode())
            count += tensor.numel()
        return tensor

    map_tensors(add, batch)
    return digest.hexdigest() if count else None


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
        super().__init__(boundary, open_, loader)
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
