"""Validation and test by several ranks: each evaluates its batches, and all get what one process would have."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.data.loaders import ShardedSampler, fit_shard
from trainer.data.rows import CountRows, row_counter
from trainer.distributed.divided import RankBatches, batches_of_rank, division_of, reads_all, warn_of_same
from trainer.distributed.merged import BatchNumbers, Numbers, exchange_outputs, host_numbers
from trainer.distributed.sharding import Shard
from trainer.errors import DataLoaderError
from trainer.hooks.capture import EpochOutputs
from trainer.hooks.recorder import Entry, is_number
from trainer.loop.boundary import Boundary
from trainer.loop.evaluation import END, EVENTS, IDLE, Evaluation, Tally
from trainer.loop.workers import Batches
from trainer.module_interface import Stage


class RankEvaluation(Evaluation):
    """Evaluates this rank's batches of each dataloader.

    At the end of a dataloader the ranks exchange losses, logged numbers and, where a hook takes them, outputs. These
    are put into the order of the batches, so that every rank has the metrics of a single process.
    """

    def __init__(self, boundary: Boundary) -> None:
        super().__init__(boundary)
        self._world = world = boundary.attempt.world
        self._shard = Shard(self._attempt.batching.evaluation_batch_size, world.data_rank, world.data_size)
        self._number = 0  # of the present batch, in the order of all ranks
        self._marks: list[tuple[int, int, int]] = []  # number, losses and logged values after each batch of this rank

    def _turns(
        self, stage: Stage, key: str, batches: Batches, loader: Iterable[Any], limit: int | None
    ) -> Iterator[Any]:
        """Yield as many turns as on any rank: a rank that is short of a batch is idle."""
        assert isinstance(batches, RankBatches)
        attempt, phase = self._attempt, f"the dataloader {key!r} of get_{EVENTS[stage][0]}_dataloaders"
        method = f"get_{EVENTS[stage][0]}_dataloaders()"
        together = attempt.strategy is not None and attempt.strategy.always_together
        last: Any = END
        self._marks = []
        rounds = self._rounds(loader, limit)
        for number in itertools.count() if rounds is None else range(rounds):
            attempt.phase = phase
            attempt.ledger.enter("data")
            batch = next(batches, END)  # WAIT: data
            if rounds is None and self._world.minimum(batch is END):  # WAIT: for all ranks
                return
            if not number and division_of(loader) == "own":
                warn_of_same(self._world, None if batch is END else batch, method)
            attempt.ledger.enter("other")
            self._boundary.cross()
            self._number = number * self._shard.world_size + self._shard.rank
            is_idle = batch is END or batches.is_dummy or (limit is not None and self._number >= limit)
            if not together:
                yield IDLE if is_idle else batch
                continue
            last = last if batch is END else batch
            if is_idle:
                self._run_idle(stage, last, method)
            yield IDLE if is_idle else batch

    def _run_idle(self, stage: Stage, batch: Any, method: str) -> None:
        """Take part in a forward pass of all ranks, without a trace."""
        if batch is END:
            raise DataLoaderError(
                f"{method} gave rank {self._world.rank} no batch, but with strategy='fsdp' all ranks compute each batch"
                f" together; give each rank a part of the data"
            )
        self._attempt.phase = f"{EVENTS[stage][0]}_step"
        with self._attempt.recorder.unseen():
            self._forward(stage, batch)

    def _rounds(self, loader: Iterable[Any], limit: int | None) -> int | None:
        """Return the most batches of any rank; None if a rank does not know."""
        division = division_of(loader)
        rounds = batches_of_rank(loader, division, self._shard.world_size)
        if division == "own":
            everyone = self._world.gather(rounds)  # WAIT: for all ranks
            known = [one for one in everyone if one is not None]
            rounds = max(known) if len(known) == len(everyone) else None
            if self._world.leads and reads_all(loader):
                self._attempt.notice(
                    f"a DataLoader for evaluation does not use the given sampler: each of the {self._world.data_size}"
                    f" ranks evaluates all that its own sampler gives; use the given one"
                )
        if limit is None:
            return rounds
        most = -(-limit // self._shard.world_size)
        return most if rounds is None else min(rounds, most)

    def _run_batch(
        self, stage: Stage, key: str, batch: Any, rows: int | None, tally: Tally, outputs: EpochOutputs | None
    ) -> None:
        kept = outputs.steps if outputs is not None else 0
        super()._run_batch(stage, key, batch, rows, tally, outputs)
        if outputs is not None and outputs.steps > kept:
            outputs.numbers.append(self._number)
        self._marks.append((self._number, len(tally.losses), len(self._attempt.recorder.values)))

    def _complete(self, tally: Tally, outputs: EpochOutputs | None, adopts: bool) -> None:
        """Take over the numbers and outputs of all ranks. WAIT: for the device, and for all ranks."""
        recorder = self._attempt.recorder
        batches = self._batches_of(tally, recorder.values)
        own = Numbers(tally.rows, tally.has_losses, outputs is not None, adopts, batches)
        everyone = self._world.gather(own)
        batches = sorted(batch for one in everyone for batch in one.batches)
        tally.batches = len(batches)
        tally.rows = None if any(one.rows is None for one in everyone) else sum(one.rows or 0 for one in everyone)
        tally.has_losses = all(one.has_losses for one in everyone)
        tally.losses = [loss for _, losses, _ in batches for loss in losses] if tally.has_losses else []
        others = [entry for entry in recorder.values if not is_number(entry[1])]
        recorder.values = [*(entry for _, _, logged in batches for entry in logged), *others]
        recorder.objects.agree(self._world.gather, evaluates=True)
        exchange_outputs(self._world, outputs, everyone)

    def _batches_of(self, tally: Tally, values: list[Entry]) -> list[BatchNumbers]:
        """Return what this rank's batches have added, as numbers of the host. SYNC: once per dataloader."""
        losses = list(zip(host_numbers([loss for loss, _ in tally.losses]), (w for _, w in tally.losses), strict=True))
        numbers = iter(host_numbers([value for _, value, _, _ in values if is_number(value)]))
        read: list[Entry | None] = [
            (name, next(numbers), w, how) if is_number(value) else None for name, value, w, how in values
        ]
        found: list[BatchNumbers] = []
        before = 0, 0
        for number, *after in self._marks:
            mine = [entry for entry in read[before[1] : after[1]] if entry is not None]
            found.append((number, losses[before[0] : after[0]], mine))
            before = after[0], after[1]
        return found

    # ------------------------------------------------------------------------------------------- the dataloader

    def _length_of(self, loader: Iterable[Any]) -> int | None:
        """Return the batches of all ranks, where the trainer divides them."""
        fit_shard(loader, ShardedSampler)
        division = division_of(loader)
        if division == "rows":
            sampler: ShardedSampler = loader.sampler  # type: ignore[attr-defined]
            return -(-sampler.rows // sampler.shard.block)
        return super()._length_of(loader) if division == "batches" else None

    def _open(self, loader: Iterable[Any]) -> Batches:
        return RankBatches(self._boundary, loader, lambda: iter(loader), self._shard.block)

    def _row_counter(self, stage: Stage, loader: Iterable[Any]) -> CountRows:
        notice = self._attempt.notice if self._weigh is None else None
        return row_counter(loader, self._shard.block, ShardedSampler, notice, f"get_{EVENTS[stage][0]}_dataloaders")
