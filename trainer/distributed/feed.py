"""The training data of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainer.data.loaders import ShuffledSampler, fit_shard
from trainer.distributed.divided import RankBatches, batches_of_rank, division_of, reads_all, warn_of_same
from trainer.errors import DataLoaderError
from trainer.loop.boundary import Boundary
from trainer.loop.feed import END, Feed, MicroBatch


class RankFeed(Feed):
    """Reads the training data of one rank, so that a step of all ranks has the rows of a step of one process."""

    def __init__(self, boundary: Boundary) -> None:
        super().__init__(boundary)
        self._world = self._attempt.world
        self._length: int | None = None  # micro-batches of the epoch on each rank
        self._divides_itself = False
        self._compares = True  # the first batches of all ranks, once per run

    def read(self) -> list[MicroBatch] | None:
        number, group = self.taken, self._read_group()
        if self._compares:
            self._compares = False
            warn_of_same(self._world, group[0].batch if group else None, "get_train_dataloader()")
        if self._divides_itself and self._length is None:
            group = self._up_to_shortest(group, number)
        if not group:
            return None
        batches, ranks = self._batches, self._world.data_size
        arguments, origin = self._attempt.arguments, self._attempt.origin
        assert isinstance(batches, RankBatches)
        total = None
        if batches.rows is not None:
            total = batches.shard.rows_of_all(batches.rows, number, len(group))
        # Of a step whose weight only all ranks together know, the parts are of what is expected.
        size = total if self._weigh is None and total else arguments.rows_of_step(origin.epoch, origin.global_step)
        block = batches.shard.block
        return [
            one._replace(part=(block if one.weight is None else one.weight) * ranks / size, all_rows=total)
            for one in group
        ]

    @property
    def _count(self) -> int:
        """Micro-batches of this rank in the next step."""
        origin = self._attempt.origin
        return self._accumulation or self._attempt.batching.accumulation_of(origin.epoch, origin.global_step)

    def _read_group(self) -> list[MicroBatch]:
        """Read the micro-batches of this rank's next step."""
        attempt, weigh, count, batches = self._attempt, self._weigh, self._count, self._batches
        assert batches is None or isinstance(batches, RankBatches)
        attempt.phase = "the training dataloader"
        attempt.ledger.enter("data")
        group: list[MicroBatch] = []
        while len(group) < count:
            if batches is not None:
                batches.is_ahead = self._counts_itself and bool(group)
            is_over = batches is None or self.taken == self._length
            batch = END if batches is None or is_over else next(batches, END)  # WAIT: data
            if batch is END or batches is None:
                self._position.used_up = True
                self.note_generators()
                break
            if batches.is_dummy:
                group.append(MicroBatch(batch, 0, 0.0, is_dummy=True))
            else:
                rows = self._rows_of(batch, self.taken)
                group.append(MicroBatch(batch, rows, rows if weigh is None else weigh(batch)))
            self.taken += 1
        if batches is not None:
            batches.is_ahead = False
        return group

    def _up_to_shortest(self, group: list[MicroBatch], number: int) -> list[MicroBatch]:
        """Cut the last step to the micro-batches that every rank has; WAIT: for all ranks, to learn their number."""
        count = self._world.minimum(len(group))
        if count < self._count:  # a rank has no further data
            self._position.used_up = True
            self._length = self.taken = number + count
        return group[:count]

    # ------------------------------------------------------------------------------------------- the dataloader

    def _ask(self, epoch: int) -> Iterable[Any]:
        loader = super()._ask(epoch)
        fit_shard(loader, ShuffledSampler)
        return loader

    def _length_of(self, loader: Iterable[Any]) -> int | None:
        """Return the micro-batches of each rank; those of the shortest if the loader divides the data itself."""
        division = division_of(loader)
        length = batches_of_rank(loader, division, self._world.data_size)
        if division != "own":
            return length
        lengths = self._world.gather(length)
        known = [one for one in lengths if one is not None]
        if len(known) < len(lengths):
            return None
        shortest = min(known)
        if not shortest:
            raise DataLoaderError(
                f"get_train_dataloader() gave rank {known.index(0)} no batch; give each rank a part of the data"
            )
        if shortest < max(known) and self._world.leads:
            self._attempt.notice(
                f"the ranks' dataloaders have different lengths ({min(known)} to {max(known)} batches): each epoch ends"
                f" with the shortest, and the rest is left out"
            )
        return shortest

    def _open(self, loader: Any, open_: Callable[[], Iterator[Any]]) -> RankBatches:
        self._divides_itself = division_of(loader) == "own"
        self._length = self._length_of(loader)
        self._compares = self._compares and self._divides_itself
        if self._world.leads and reads_all(loader):
            self._attempt.notice(
                f"get_train_dataloader() returned a DataLoader that does not use the given sampler: each of the"
                f" {self._world.data_size} ranks trains on all that its own sampler gives; use the given one, or"
                f" torch's DistributedSampler"
            )
        micro_batch = self._attempt.batching.micro_batch_of(self._attempt.origin.epoch)
        return RankBatches(self._boundary, loader, open_, micro_batch)
