"""Validations during training: due dates, and the users of their metrics."""

from __future__ import annotations

import math
from typing import Any

from events.metrics import TRAIN_EPOCH_LOSS
from trainer.checkpoint.position import Position
from trainer.data.loaders import as_val_loaders, sequential_sampler
from trainer.data.rng import RngState, capture_rng, restore_rng
from trainer.distributed.sharding import Shard
from trainer.errors import DataLoaderError
from trainer.hooks.reductions import Value
from trainer.loop.boundary import Boundary
from trainer.loop.evaluation import Evaluation
from trainer.loop.feed import Feed
from trainer.loop.norm_statistics import NormStatistics
from trainer.loop.optimization import Optimization
from trainer.module_interface import Stage


class Validation:
    """Validates the module between two steps. On the thread of the loop.

    A validation changes none of the random generators that training uses: what training computes does not depend on
    when the module is validated.
    """

    def __init__(self, boundary: Boundary, evaluation: Evaluation, optimization: Optimization, feed: Feed) -> None:
        self._boundary = boundary
        self._attempt = boundary.attempt
        self._checkpoints = boundary.checkpoints
        self._position: Position = boundary.checkpoints.position
        self._evaluation = evaluation
        self._optimization = optimization
        self._feed = feed
        self._statistics = NormStatistics(boundary, feed)
        self._interval = boundary.attempt.arguments.val_interval_steps
        self._within_epoch: frozenset[int] = frozenset()

    def begin_epoch(self, loader: Any, steps: int | None) -> None:
        """Plan the validations within an epoch of that many steps.

        Raises:
            DataLoaderError: They are to come at fractions of an epoch, and its length is unknown.
        """
        self._statistics.of_epoch(loader)
        every = self._attempt.arguments.val_interval_epochs
        if self._interval is not None or not 0 < every < 1:
            return
        if steps is None:
            raise DataLoaderError(
                f"val_interval_epochs={every} needs the number of steps of an epoch, and the training dataloader has no"
                f" length; set val_interval_steps"
            )
        if every * steps < 1:
            self._attempt.notice(
                f"val_interval_epochs={every}: the part of an epoch is shorter than a step, of which it has {steps}, so"
                f" the run validates after every step; set a larger one"
            )
        count = math.ceil(1 / every - 1e-9)
        first = self._position.first_step
        self._within_epoch = frozenset(first + math.ceil(i * every * steps - 1e-9) for i in range(1, count))

    @property
    def is_due(self) -> bool:
        """Whether a validation is due after the last step."""
        step = self._attempt.origin.global_step
        planned = step in self._within_epoch or (self._interval is not None and step % self._interval == 0)
        # A step that was skipped right after a validation does not validate again.
        return planned and step != self._position.validated_at

    def at_start(self) -> bool:
        """Validate before the first step of a run, if that is wanted; returns whether it was."""
        attempt = self._attempt
        if not attempt.arguments.validate_at_start or attempt.origin.global_step or self._position.phase != "begin":
            return False
        self._run(None)
        return True

    def after_step(self, interrupted: RngState | None = None) -> None:
        """Validate between two steps of an epoch.

        Args:
            interrupted: The random generators of a validation that an earlier attempt began, at the dataloader on that
                is left.
        """
        if interrupted is None:
            self._statistics.refresh()
        self._position.phase = "validate"
        self._run(interrupted)
        self._position.phase = "train"
        if self._boundary.stop_wanted and interrupted is None:
            self._boundary.take_commands()  # before the next step

    def after_epoch(self, epoch: int, interrupted: RngState | None = None) -> None:
        """Validate at the end of an epoch, if that is due."""
        attempt, every = self._attempt, self._attempt.arguments.val_interval_epochs
        last = epoch + 1 == attempt.arguments.epoch_limit or attempt.is_at_max_steps
        if self._interval is not None or 0 < every < 1:  # the end of the run, or of each epoch, is validated as well
            is_due = (last or self._interval is None) and self._position.validated_at != attempt.origin.global_step
        else:
            is_due = bool(every) and (last or (epoch + 1) % every == 0)
        if is_due:
            if self._position.rng_at_val_loaders is None:  # an earlier attempt ended before this validation
                interrupted = None
                self._statistics.refresh()
            self._run(interrupted)

    def at_end(self) -> None:
        """Training has ended: complete the averaged weights, which no validation may have done."""
        self._attempt.averaging.warn_of_none()
        self._statistics.refresh(last=True)

    def judge_epoch(self) -> None:
        """Pass the epoch's metrics to the users of ``train_epoch_loss``, and to those without a validation."""
        never = self._interval is None and not self._attempt.arguments.val_interval_epochs
        in_its_place = never or self._position.judges_epoch
        self._judge(self._attempt.recorder.epoch, epoch_loss=None if in_its_place else True)
        self._position.judges_epoch = False

    @property
    def follows_epoch_loss(self) -> bool:
        """Whether the loop needs the epoch's mean loss, which is otherwise computed where losses are read."""
        callbacks = self._attempt.hooks.callbacks
        return (
            self._optimization.schedules.follows_epoch_loss
            or self._best == TRAIN_EPOCH_LOSS
            or any(one.should_stop is not None and one.monitor in (None, TRAIN_EPOCH_LOSS) for one in callbacks)
        )

    @property
    def _best(self) -> str | None:
        settings = self._checkpoints.settings
        return settings.best if settings is not None else None

    def _run(self, interrupted: RngState | None) -> None:
        attempt, position, recorder = self._attempt, self._position, self._attempt.recorder
        if attempt.ledger.idle is not None:
            attempt.ledger.idle.forget()
        before = position.rng_at_val_loaders if interrupted is not None else None
        if before is not None:
            restore_rng(before, attempt.device)
        else:
            before = position.rng_at_val_loaders = capture_rng(attempt.device)
        own = [generator.get_state() for generator in self._feed.generators]  # a validation's dataloader may share them
        loaders = self._ask()
        if interrupted is not None:
            restore_rng(interrupted, attempt.device)
        if not position.validated_keys:
            recorder.begin_validation(attempt.origin.global_step)
        left = {key: loader for key, loader in loaders.items() if key not in position.validated_keys}
        if left:
            gate = self._checkpoints.stager.gate
            with self._optimization.evaluation(gate), attempt.averaging.applied(gate):
                if attempt.strategy is not None:
                    attempt.strategy.sync_buffers()  # WAIT: for all ranks
                self._evaluation.run(
                    Stage.VAL,
                    left,
                    attempt.arguments.max_val_steps_per_epoch,
                    under_way=interrupted is not None,  # a checkpoint within one is taken between two of its batches
                    on_loader=self._on_loader,
                    on_done=self._on_done,
                )
        position.rng_at_validation = position.rng_at_val_loaders = None
        position.validated_keys = []
        position.validated_at = attempt.origin.global_step
        attempt.phase = "the schedulers"
        if loaders:
            self._judge(recorder.validation, epoch_loss=False)
        else:
            position.judges_epoch = True
        restore_rng(before, attempt.device)
        for generator, state in zip(self._feed.generators, own, strict=True):
            generator.set_state(state)

    def _ask(self) -> dict[str, Any]:
        attempt = self._attempt
        attempt.phase = "get_val_dataloaders"
        with attempt.ledger.within("data"):
            batch_size = attempt.batching.evaluation_batch_size
            sampler = sequential_sampler(Shard(batch_size, attempt.world.data_rank, attempt.world.data_size))
            return as_val_loaders(attempt.module.get_val_dataloaders(sampler, batch_size))

    def _judge(self, metrics: dict[str, Value], *, epoch_loss: bool | None) -> None:
        """Pass metrics to their users: schedulers, the best checkpoint, callbacks.

        Args:
            epoch_loss: Only to those that follow ``train_epoch_loss``; False: only to the others. None: to all.
        """
        recorder, world = self._attempt.recorder, self._attempt.world
        if world.size > 1:
            from trainer.distributed.merged import merge_judged  # late, because a single process does not need it

            merge_judged(world, metrics)
        recorder.judged = metrics
        self._optimization.schedules.follow(epoch_loss=epoch_loss)
        if epoch_loss is None or epoch_loss == (self._best == TRAIN_EPOCH_LOSS):
            self._checkpoints.after_validation()
        self._boundary.ask_to_stop(epoch_loss=epoch_loss)
        if not epoch_loss:
            recorder.end_judging()

    def _on_loader(self, key: str) -> None:
        if self._checkpoints.enabled:
            self._position.rng_at_validation = capture_rng(self._attempt.device)
            self._attempt.recorder.objects.hold()

    def _on_done(self, key: str) -> None:
        self._position.rng_at_validation = None
        self._attempt.recorder.objects.release()
        self._position.validated_keys = [*self._position.validated_keys, key]
