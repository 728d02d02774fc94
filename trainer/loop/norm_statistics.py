"""Batch norm statistics of averaged weights, computed from the training data. On the loop's thread."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trainer.averaging import AveragedWeights
from trainer.data.loaders import as_val_loaders, end_iteration, has_state, keeps_workers, loader_length
from trainer.data.rng import capture_rng, restore_rng
from trainer.loop.boundary import Boundary
from trainer.loop.feed import Feed
from trainer.loop.workers import Batches
from trainer.module_interface import Stage


class NormStatistics:
    """Runs `train_step` over the training data, without gradients, for callbacks that average the weights.

    What training computes does not depend on it: random generators and metric objects are restored, and logged values
    are discarded.
    """

    def __init__(self, boundary: Boundary, feed: Feed) -> None:
        self._boundary = boundary
        self._attempt = boundary.attempt
        self._feed = feed
        self._loader: Callable[[], Any] = lambda: None

    def of_epoch(self, loader: Any) -> None:
        """Note the dataloader of an epoch, which may be under way and cannot be read twice."""
        try:
            self._loader = weakref.ref(loader)  # persistent workers end with the last reference to their dataloader
        except TypeError:  # a list, for example
            self._loader = lambda: None

    def refresh(self, *, last: bool = False) -> None:
        """Compute the statistics that a validation, or with ``last`` the end of training, needs.

        A checkpoint that is taken meanwhile resumes before it.
        """
        attempt, checkpoints = self._attempt, self._boundary.checkpoints
        for average in attempt.averaging.stale(last=last):
            before = capture_rng(attempt.device)
            own = [generator.get_state() for generator in self._feed.generators]
            if checkpoints.enabled:
                checkpoints.position.rng_at_validation = before
            objects = attempt.recorder.objects
            logged = dict(objects.epoch)
            objects.hold()
            try:
                loader = self._ask(average)
                if loader is not None:
                    self._run(average, loader)
            finally:
                attempt.recorder.discard()
                held = objects.state_dict()
                objects.release()
                objects.epoch = logged
                objects.load_state_dict(held)
                checkpoints.position.rng_at_validation = None
                restore_rng(before, attempt.device)
                for generator, state in zip(self._feed.generators, own, strict=True):
                    generator.set_state(state)

    def _ask(self, average: AveragedWeights) -> Any:
        """Ask the module for a dataloader of the training data; None if it cannot be read here."""
        attempt = self._attempt
        attempt.phase = method = "get_train_dataloader"
        with attempt.ledger.within("data"):
            batch_size = attempt.arguments.micro_batch_of(attempt.origin.epoch)
            loader: Any = attempt.module.get_train_dataloader(torch.utils.data.SequentialSampler, batch_size)
            loader = as_val_loaders(loader if loader is not None else {}, method)["default"]
        if loader is self._loader() and (isinstance(loader, Iterator) or has_state(loader) or keeps_workers(loader)):
            attempt.notice(
                f"{average.name} cannot compute batch norm statistics: {method}() returns the dataloader of the epoch,"
                f" whose place is lost when it is read twice; return a new one at each call"
            )
            return None
        return loader

    def _run(self, average: AveragedWeights, loader: Any) -> None:
        attempt, ledger = self._attempt, self._attempt.ledger
        before = ledger.enter("data")
        batches = Batches(self._boundary, lambda: iter(loader), loader)

        def read() -> Iterator[Any]:
            for batch in batches:  # WAIT: data
                ledger.enter("other")
                self._boundary.cross()
                ledger.enter("compute")
                yield batch
                ledger.enter("data")
                attempt.phase = "the training dataloader"

        def run(batch: Any) -> None:
            attempt.phase = "train_step"
            step = attempt.origin.global_step
            if attempt.precision.enabled:
                with attempt.precision.autocast():
                    attempt.module(Stage.TRAIN, step, batch, attempt.device)
            else:
                attempt.module(Stage.TRAIN, step, batch, attempt.device)

        limit = attempt.arguments.max_train_steps_per_epoch
        if limit is None and loader_length(loader) is None:
            limit = attempt.arguments.max_steps  # the data may be endless
        if limit is not None:
            limit *= attempt.arguments.accumulation_of(attempt.origin.epoch, attempt.origin.global_step)
        try:
            gate = self._boundary.checkpoints.stager.gate
            attempt.averaging.recompute(average, itertools.islice(read(), limit), run, gate)
        finally:
            end_iteration(batches.source, loader)
            ledger.enter(before)
