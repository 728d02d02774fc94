"""The training data: a dataloader per epoch, and the micro-batches of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from events.errors import CheckpointMismatch
from events.log import logger
from trainer.checkpoint.position import Position
from trainer.data.loaders import (
    ShuffledSampler,
    as_val_loaders,
    batch_rows,
    data_rows,
    end_iteration,
    generators_of,
    has_live_workers,
    has_state,
    hides_epoch,
    iterate,
    keeps_workers,
    loader_length,
    make_train_sampler,
    own_batches,
    set_epoch,
    skip_batches,
    state_of_order,
)
from trainer.data.rng import capture_rng, restore_rng
from trainer.data.rows import row_counter, weight_of
from trainer.distributed.sharding import Shard
from trainer.errors import DataLoaderError, EmptyDataLoader
from trainer.loop.boundary import Boundary
from trainer.loop.step_plan import StepPlan
from trainer.loop.workers import Batches

END = object()
"""Stands for the end of the data."""


class MicroBatch(NamedTuple):
    """One batch of the dataloader. A step is one of them, or several."""

    batch: Any
    rows: int | None
    """None if the number is not known."""
    weight: float | None
    """What the batch counts in the loss of its step and in means; its rows if the module has no ``batch_weight``."""
    part: float = 1.0
    """With several ranks: its part of the mean over the ranks, if the weight of all of them is what was expected."""
    is_dummy: bool = False
    """Whether this rank is short of a batch: another one is computed, and counts nothing."""
    all_rows: int | None = None
    """With several ranks: the rows of the whole step, if they are certain."""


class Feed:
    """Reads the training data of a run. On the thread of the loop.

    Attributes:
        generators: The random generators of the present dataloader itself.
        taken: Micro-batches of this epoch that were read so far.
    """

    def __init__(self, boundary: Boundary) -> None:
        self.generators: list[torch.Generator] = []
        self.taken = 0
        self._boundary = boundary
        self._attempt = boundary.attempt
        self._position: Position = boundary.checkpoints.position
        self._accumulation = 0  # micro-batches of a step; 0: computed for each
        self._weigh = weight_of(self._attempt.module)
        self._rows_of: Callable[[Any, int], int | None] = lambda batch, number: None
        self._order: type[ShuffledSampler] | None = None  # base of all samplers of the run, with the epoch
        self._recalled: Any = None  # the dataloader of the epoch before, if this process has not iterated it
        self._first_loader: Iterable[Any] | None = None
        self._batches: Batches | None = None  # nothing is left to read
        self._counts_itself = False  # the dataloader keeps its own position, which is ahead of the steps within a group
        self._iteration: tuple[Iterator[Any], Any] | None = None  # over the epoch's data, and the dataloader
        self._read_early: tuple[Any, type[ShuffledSampler], int] | None = None
        """A dataloader for which the module has iterated the sampler itself, that sampler's class, and how often."""
        self._state_of_order: torch.Tensor | None = None  # before the epoch that was iterated last

    @property
    def weighs(self) -> bool:
        """Whether the module has a ``batch_weight``."""
        return self._weigh is not None

    @property
    def plan(self) -> StepPlan:
        """The steps of the run's epochs."""
        return StepPlan(self._attempt.batching, self._length_of)

    def _length_of(self, loader: Iterable[Any]) -> int | None:
        return loader_length(loader)

    def _shard(self, epoch: int) -> Shard:
        """This rank's part of an epoch, in the batches that the module is asked for."""
        world = self._attempt.world
        return Shard(self._attempt.batching.micro_batch_of(epoch), world.data_rank, world.data_size)

    # ------------------------------------------------------------------------------------- dataloaders

    def recall(self) -> None:
        """Resumed between two epochs: ask for the dataloader of the one before, as the run has done.

        A module may keep it for the epochs that follow, perhaps at a place of its own.
        """
        position, epoch = self._position, self._attempt.origin.epoch
        if epoch:
            loader: Any = self._ask(epoch - 1)
            if position.loader_state is not None and has_state(loader):
                loader.load_state_dict(position.loader_state)
            self._recalled = loader

    def ask_for_first_loader(self) -> Iterable[Any]:
        """Ask for the dataloader of the first epoch. Those of later epochs are asked for when they begin."""
        self._first_loader = loader = self._loader_of(self._attempt.origin.epoch)
        return loader

    def next_loader(self, epoch: int) -> Iterable[Any]:
        """Return the dataloader of an epoch.

        The feed does not keep it: persistent workers end with the last reference to their dataloader.
        """
        loader, self._first_loader = self._first_loader, None
        return loader if loader is not None else self._loader_of(epoch)

    def close(self) -> None:
        """Close open iterators, and release the data: an exception may keep this object."""
        self.end()
        self._recalled = self._read_early = self._first_loader = None

    def _loader_of(self, epoch: int) -> Iterable[Any]:
        position = self._position
        if position.phase == "begin":
            if self._boundary.checkpoints.enabled:
                position.rng_at_loader = capture_rng(self._attempt.device)
            position.loader_state = None
        return self._ask(epoch)

    def _ask(self, epoch: int) -> Iterable[Any]:
        attempt, seed = self._attempt, self._position.sampler_seed
        attempt.phase = "get_train_dataloader"
        with attempt.ledger.within("data"):
            self._order = self._order or make_train_sampler(seed, epoch, shard=self._shard(epoch))
            self._order.epoch = epoch
            # A class of its own each time: it counts the samplers that are made of it, and skips for one of them.
            sampler = make_train_sampler(seed, None, self._order, self._shard(epoch))
            attempt.module.current_epoch = epoch
            loader: Any = attempt.module.get_train_dataloader(sampler, attempt.batching.micro_batch_of(epoch))
            self._warn_of_early_order(loader, sampler)
            loaders = as_val_loaders(loader if loader is not None else {}, "get_train_dataloader")
            if list(loaders) != ["default"]:
                raise EmptyDataLoader(
                    f"get_train_dataloader() returned {loader!r}: return one dataloader, or any iterable of batches"
                )
        return loaders["default"]

    # ------------------------------------------------------------------------------------------- an epoch

    def begin(self, loader: Iterable[Any], *, resumed: bool) -> None:
        """Start to read an epoch.

        Args:
            resumed: The run is resumed before this epoch.
        """
        attempt, position = self._attempt, self._position
        recalled = self._prepare(loader, resumed)
        if recalled is not None:
            self._keep_generators(recalled, loader)
        self._warn_of_order(loader)
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, ShuffledSampler):
            type(sampler).skip = 0  # one that was resumed where nothing was left to read has not skipped yet
        if self._boundary.checkpoints.enabled:
            position.rng_at_iter = capture_rng(attempt.device)
            self.note_generators()
            position.batching, position.world_size = self._batching(loader), attempt.world.data_size
        position.keeps_workers = has_live_workers(loader) or (loader is recalled and keeps_workers(loader))
        position.phase = "train"
        with attempt.ledger.within("data"):
            self._iterate(loader, position.seed_of_workers(attempt.origin.epoch))  # WAIT: workers start

    def resume(self, loader: Any, rng: dict[str, Any]) -> None:
        """Read on in an epoch, behind the batches that its finished steps have used.

        Args:
            rng: The random generators of the checkpoint, which a checkpoint during the skipping must hold too.

        Raises:
            DataLoaderError: The data ends before that place.
        """
        position = self._position
        self._fit_place(loader)
        self._prepare(loader, resumed=True)
        if position.phase == "end" or position.used_up:
            if position.loader_state is not None and has_state(loader):
                loader.load_state_dict(position.loader_state)
            self._keep_generators(loader, loader)
            self._recalled = loader
            return
        with self._attempt.ledger.within("data"):
            position.rng_at_validation = rng
            self._find_place(loader)  # WAIT: data
            position.rng_at_validation = None

    def read(self) -> list[MicroBatch] | None:
        """Read the micro-batches of the next step; None if the data of the epoch has ended."""
        attempt, weigh = self._attempt, self._weigh
        count = self._accumulation or attempt.batching.accumulation_of(attempt.origin.epoch, attempt.origin.global_step)
        attempt.phase = "the training dataloader"
        attempt.ledger.enter("data")
        group: list[MicroBatch] = []
        batches = self._batches
        while len(group) < count:
            if batches is not None:
                batches.is_ahead = self._counts_itself and bool(group)
            batch = END if batches is None else next(batches, END)  # WAIT: data
            if batch is END:
                self._position.used_up = True
                self.note_generators()
                break
            rows = self._rows_of(batch, self.taken)
            group.append(MicroBatch(batch, rows, rows if weigh is None else weigh(batch)))
            self.taken += 1
        if batches is not None:
            batches.is_ahead = False
        return group or None

    def end(self) -> None:
        """End the iteration, and with it the workers of the dataloader."""
        self._batches = None
        iteration, self._iteration = self._iteration, None
        if iteration is not None:
            with self._attempt.ledger.within("data"):
                end_iteration(*iteration)
                del iteration

    def note_generators(self) -> None:
        """Note the states of the dataloader's own generators, for a checkpoint."""
        if self._boundary.checkpoints.enabled:
            self._position.generators_at_iter = [generator.get_state() for generator in self.generators]

    def _prepare(self, loader: Iterable[Any], resumed: bool) -> Any:
        """Prepare to read a dataloader; returns the one that was recalled, if there is one."""
        attempt, position = self._attempt, self._position
        self.generators = generators_of(loader)
        self.taken = position.batches
        self._counts_itself = has_state(loader)
        notice = attempt.notice if self._weigh is None else None  # only `rows` in events depends on the count
        micro_batch = attempt.batching.micro_batch_of(attempt.origin.epoch)
        self._accumulation = attempt.batching.accumulation_in(attempt.origin.epoch) or 0
        self._rows_of = row_counter(loader, micro_batch, ShuffledSampler, notice, "get_train_dataloader")
        # Also for a dataloader that the module keeps: persistent workers need that.
        assert self._order is not None
        self._order.epoch = attempt.origin.epoch
        set_epoch(loader, attempt.origin.epoch)
        recalled, self._recalled = self._recalled, None
        before, position.data_rows = position.data_rows, data_rows(loader)
        # The length may change from epoch to epoch.
        again = position.data_rows if recalled is None else data_rows(recalled)
        if resumed and before is not None and again != before:
            when = "before" if position.phase == "begin" else "when"
            logger.warning(
                f"the training data has the length {again} and had {before} {when} the checkpoint was taken, so the"
                f" run does not continue exactly; resume with the same data"
            )
        return recalled

    def _batching(self, loader: Any) -> tuple[int, int]:
        """Rows of the dataloader's batches, and micro-batches of the epoch's first step."""
        arguments, epoch = self._attempt.batching, self._attempt.origin.epoch
        rows = batch_rows(loader, arguments.micro_batch_of(epoch))
        return rows, arguments.accumulation_of(epoch, self._position.first_step)

    def _iterate(self, loader: Any, seed: int | None) -> Batches:
        self._batches = batches = self._open(loader, lambda: iterate(loader, seed))
        self._iteration = batches.source, loader  # from here on, every way out ends it
        return batches

    def _open(self, loader: Any, open_: Callable[[], Iterator[Any]]) -> Batches:
        return Batches(self._boundary, open_, loader)

    def _fit_place(self, loader: Any) -> None:
        """Count the micro-batches of the finished steps in those of this run, if they had another size."""
        position, arguments, world_size = self._position, self._attempt.arguments, self._attempt.world.data_size
        if position.batching is None or not position.batches:
            return
        (micro, steps), ranks, (now, now_steps) = position.batching, position.world_size, self._batching(loader)
        if (micro, steps, ranks) == (now, now_steps, world_size):
            return
        by_rows = arguments.resume_data == "skip" and micro * steps * ranks == now * now_steps * world_size
        if by_rows and position.loader_state is None and own_batches(loader, ShuffledSampler) is not None:
            sampler = loader.sampler
            position.batches = sampler.shard.rounds(min(sampler.rows, position.batches * micro * ranks))
            return
        before, after = (f"{count} micro-batches of {rows} rows" for count, rows in ((steps, micro), (now_steps, now)))
        if ranks != 1 or world_size != 1:
            before, after = f"{before} on {ranks} ranks", f"{after} on {world_size}"
        raise CheckpointMismatch(
            f"the checkpoint was taken within an epoch in which a step had {before}, and now it has"
            f" {after.replace(' micro-batches', '').replace(' rows', '')}: resume with those batch sizes, or from a"
            f" checkpoint that was taken at the end of an epoch"
        )

    def _find_place(self, loader: Any) -> None:
        position, arguments = self._position, self._attempt.arguments
        seed = position.seed_of_workers(self._attempt.origin.epoch)
        if position.rng_at_iter is not None:
            restore_rng(position.rng_at_iter, self._attempt.device)
        for generator, state in zip(generators_of(loader), position.generators_at_iter or (), strict=False):
            generator.set_state(state)
        if position.loader_state is not None and has_state(loader):
            loader.load_state_dict(position.loader_state)
            self._iterate(loader, seed)
            return
        skips = arguments.resume_data == "skip"
        if skips and skip_batches(loader, position.batches):
            length = loader_length(loader)  # of other loaders it may be a guess: of an IterableDataset with workers
            if length is not None and length < position.batches:
                raise _too_short(length, position)
            self._iterate(loader, seed)
            return
        if skips and position.batches:
            logger.warning(
                f"get_train_dataloader() returned data that cannot be skipped: {position.batches} batches are read and"
                f" discarded (skipping needs a torch DataLoader with the given sampler and a batch size; a loader with"
                f" state_dict and load_state_dict is asked for its own place)"
            )
        batches = self._iterate(loader, seed)
        for number in range(position.batches):
            self._boundary.tick("skip")
            if next(batches, END) is END:
                raise _too_short(number, position)

    # --------------------------------------------------------------------------------------- its order

    def _keep_generators(self, before: Any, loader: Any) -> None:
        """Set those generators of a dataloader that the module keeps over epochs to their states in the checkpoint."""
        kept = {id(generator) for generator in generators_of(loader)}
        for generator, state in zip(generators_of(before), self._position.generators_at_iter or (), strict=False):
            if id(generator) in kept:
                generator.set_state(state)

    def _warn_of_order(self, loader: Any) -> None:
        """Warn if an epoch would have the order of the epoch before."""
        order, before = state_of_order(loader), self._state_of_order
        self._state_of_order = order
        if order is not None and before is not None and torch.equal(order, before):
            self._attempt.notice(
                "get_train_dataloader() seeds the generator that shuffles in each epoch, so all epochs have the same"
                " order; seed it once, or use the given sampler"
            )
        if hides_epoch(loader):
            self._attempt.notice(
                f"set_epoch() of {type(loader.dataset).__name__} does not reach persistent workers, so they may repeat"
                f" the order of an earlier epoch; share its epoch with them in a tensor (share_memory_()), or set"
                f" persistent_workers=False"
            )

    def _warn_of_early_order(self, loader: Any, sampler: type[ShuffledSampler]) -> None:
        """Warn if the module keeps a dataloader whose order it has read when it made it."""
        if (early := self._read_early) is not None and loader is early[0] and not sampler.iterations:
            if early[1].iterations == early[2]:  # not in the epochs since, either
                self._attempt.notice(
                    "get_train_dataloader() keeps a dataloader but iterates the given sampler only when it makes it, so"
                    " all epochs have the same order; make a new dataloader for each epoch, or give it the sampler"
                )
            return
        self._read_early = (loader, sampler, sampler.iterations) if sampler.iterations else None


def _too_short(length: int, position: Position) -> DataLoaderError:
    return DataLoaderError(
        f"get_train_dataloader() gives {length} batches, but the checkpoint was taken after {position.batches} of them:"
        f" resume with the data and the batch size that it was trained with"
    )
