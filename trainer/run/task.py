"""What the thread of the loop does: train or test, from reading the checkpoint to the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from events.log import logger
from events.messages import CheckpointRejected, RankEnded, RunResumed, RunStarted
from events.tracebacks import describe
from trainer.checkpoint.fit import takes_state_by_default
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.position import Position
from trainer.checkpoint.resume import Search
from trainer.data.loaders import as_val_loaders, has_state, sequential_sampler
from trainer.data.rng import RngState, capture_rng, restore_rng, seed_everything, seeded_rng
from trainer.data.tensors import clone_tensors
from trainer.distributed.ending import ends_of
from trainer.distributed.reading import read_together
from trainer.distributed.sharding import Shard, seed_for
from trainer.distributed.strategy import prepare
from trainer.errors import ContractError, OptimizerError, add_note
from trainer.loop.boundary import Boundary
from trainer.loop.checkpointing import PREPARING
from trainer.loop.evaluation import Evaluation
from trainer.loop.feed import Feed
from trainer.loop.loop import TrainingLoop
from trainer.loop.optimization import Optimization
from trainer.loop.saved_state import checked_scaler
from trainer.loop.step_plan import EpochSize, StepPlan
from trainer.module_interface import Stage


class Task:
    """Trains or tests one module. On the thread of the loop.

    Attributes:
        started: `RunStarted` is published, the first event of an attempt.
        on_started: Called then.
        outputs: What a test returned, per key.
        epochs: Epochs that were finished.
    """

    def __init__(self, boundary: Boundary) -> None:
        self.started = False
        self.on_started: Callable[[], None] | None = None
        self.outputs: dict[str, tuple[Any, ...]] = {}
        self.epochs = 0
        self._boundary = boundary
        self._attempt = boundary.attempt
        self._checkpoints = boundary.checkpoints
        self._rejected: list[tuple[str, str]] = []  # text only: an exception would keep its frames
        self._loaded: Loaded | None = None

    @property
    def resumed_from(self) -> str | None:
        """The folder of the checkpoint of this run that it has resumed from."""
        loaded = self._loaded
        return str(loaded.folder) if loaded is not None and self._attempt.plan.name_of(loaded) is not None else None

    def train(self) -> None:
        """Train, from the checkpoint if there is one."""
        attempt = self._attempt
        if attempt.world.shards:  # first, so that a rank reads no more than its part
            self._distribute()
        loaded = self._load()
        if loaded is None:
            attempt.phase = "reading the weights to start from"
            attempt.plan.load_weights(attempt.module, self._read_together)
        if not attempt.world.shards:
            self._distribute()
        feed = self._make_feed()
        try:
            loop, optimization = self._prepare(feed, loaded)
            attempt.ledger.start()
            try:
                loop.run(loaded)
            finally:
                self.epochs = loop.epochs_finished
                loop.close()
                optimization.close(self._checkpoints.stager.gate)
        finally:
            self._checkpoints.loader = None  # or its workers would live on
            feed.close()

    def _distribute(self) -> None:
        """Wrap the module for the ranks of the run, and let each draw random numbers of its own from here on."""
        attempt, world = self._attempt, self._attempt.world
        if not world.is_distributed:
            return
        attempt.phase = "distributing the module"
        loads = attempt.plan.replaces_all(attempt.module)
        attempt.strategy = world.together(
            lambda: prepare(attempt.module, world, attempt.arguments, attempt.device, loads=loads)
        )
        seed = attempt.arguments.seed
        seed = world.share(torch.initial_seed() if seed is None else seed)
        if not world.leads:
            seed_everything(seed_for(seed, world.data_rank))

    def _shard(self) -> None:
        """Divide the module for an evaluation, too: it may not fit a single device."""
        if self._attempt.world.shards:
            self._distribute()

    def _make_feed(self) -> Feed:
        if self._attempt.strategy is None:
            return Feed(self._boundary)
        from trainer.distributed.feed import RankFeed  # late, because a single process does not need it

        return RankFeed(self._boundary)

    def _make_evaluation(self) -> Evaluation:
        if self._attempt.world.size == 1:
            return Evaluation(self._boundary)
        from trainer.distributed.evaluation import RankEvaluation  # late, because a single process does not need it

        return RankEvaluation(self._boundary)

    def _prepare(self, feed: Feed, loaded: Loaded | None) -> tuple[TrainingLoop, Optimization]:
        """Ask the module for all that it trains with, and restore the checkpoint into it."""
        attempt, origin, position = self._attempt, self._attempt.origin, self._checkpoints.position
        rng = self._open_data(feed, position, loaded)
        optimization = self._make_optimization(feed.plan, position)
        if loaded is not None:
            self._restore(loaded, optimization)
            restore_rng(rng, attempt.device)
        optimization.gradients.clear()  # gradients that the host has left do not belong to the first step
        self._bind_optimizers(optimization)
        attempt.phase = "setup"
        loop = TrainingLoop(self._boundary, self._make_evaluation(), feed, optimization)
        attempt.phase = PREPARING
        self._checkpoints.start(optimization)
        # Not before all of that: an attempt that fails before it trains leaves the line, and the history, as they are.
        attempt.plan.prepare(origin.attempt, loaded)
        self._publish_resumed(loaded)
        attempt.phase = "setup"
        return loop, optimization

    def _open_data(self, feed: Feed, position: Position, loaded: Loaded | None) -> RngState:
        """Ask for the first dataloader; returns the random generators after that."""
        attempt, arguments, origin = self._attempt, self._attempt.arguments, self._attempt.origin
        if loaded is None:
            # Drawn from torch's generator, so that a host that has seeded it itself gets the same order each time; on
            # the CPU, so that no device is waited for.
            seed = arguments.seed
            drawn = int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed
            position.sampler_seed, position.world_size = attempt.world.share(drawn), attempt.world.data_size
        else:
            if position.phase == "begin":
                feed.recall()
                self._restore_again(loaded)
            restore_rng((position.phase != "begin" and position.rng_at_loader) or loaded.rng, attempt.device)
        loader = feed.ask_for_first_loader()
        rng = capture_rng(attempt.device)
        if loaded is not None and position.phase != "begin":
            self._restore_again(loaded)
        plan, done = feed.plan, origin.global_step if position.phase == "begin" else position.first_step
        size = plan.size_of(loader, origin.epoch)
        if loaded is None or arguments.reset_optimizers_schedulers or position.limits != plan.key:
            position.limits = plan.key
            position.epoch_size = size and (size.batches, size.micro_batch, size.rows, size.drop_last)
        total, _ = plan.run(size, origin.epoch, done)
        if total is None:
            logger.warning(
                "get_train_dataloader() returned data without a length, so get_optimizers_schedulers() gets 0 steps per"
                " epoch; set max_steps or max_train_steps_per_epoch if a scheduler needs the number"
            )
        self.publish_started(plan.steps(size, origin.epoch, done), total)
        if loaded is not None and isinstance(loader, Iterator) and not has_state(loader) and origin.epoch > 0:
            logger.warning(
                "get_train_dataloader() returned an iterator, which starts from its beginning in each process, so the"
                " run reads again what earlier epochs have read; give it state_dict and load_state_dict"
            )
        return rng

    def _make_optimization(self, plan: StepPlan, position: Position) -> Optimization:
        attempt, origin = self._attempt, self._attempt.origin
        attempt.phase = "get_optimizers_schedulers"
        size = None if position.epoch_size is None else EpochSize(*position.epoch_size)
        place = size, origin.epoch, position.planned_steps
        object.__setattr__(attempt.module, "_total_steps", plan.run(*place)[0])
        begins_here = attempt.arguments.reset_optimizers_schedulers
        numbers = plan.numbers(*place, trained=origin.global_step if begins_here else None)
        made = Optimization(attempt.module.get_optimizers_schedulers(*numbers), attempt)
        if attempt.world.shards and any(isinstance(one, torch.optim.Adafactor) for one in made.optimizers):
            raise OptimizerError("torch.optim.Adafactor cannot compute with divided parameters; set strategy='ddp'")
        trained = {
            id(one) for optimizer in made.optimizers for group in optimizer.param_groups for one in group["params"]
        }
        attempt.precision.check(one for one in attempt.module.named_parameters() if id(one[1]) in trained)
        return made

    def _bind_optimizers(self, optimization: Optimization) -> None:
        for callback in self._attempt.hooks.callbacks:
            if callback.bind_optimizers is not None and not callback.disabled:
                self._attempt.phase = "bind_optimizers"
                try:
                    callback.bind_optimizers(optimization.optimizers)
                except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                    add_note(error, f"raised by {callback.name}.bind_optimizers")
                    self._attempt.fail_hook(callback, "bind_optimizers", error)
        self._attempt.averaging.bind(optimization, self._attempt.module)

    # -------------------------------------------------------------------------------------------- resuming

    def _load(self) -> Loaded | None:
        """Read the checkpoint to resume from, if there is one, and write the note of this attempt."""
        self._attempt.phase = "reading the checkpoint"
        plan, origin = self._attempt.plan, self._attempt.origin
        loaded = self._loaded = self._read()
        if loaded is not None:
            loaded.restore_module(self._attempt.module)
            loaded.restore_frozen(self._attempt.module)
            world, device = self._attempt.world, self._attempt.device
            loaded.become(world.data_rank, world.data_size, lambda seed: seeded_rng(seed, device))
            origin.global_step, origin.epoch = loaded.global_step, loaded.epoch
            self._checkpoints.resume(loaded.position, plan.name_of(loaded), plan.scores_up_to(loaded))
        return loaded

    def _read(self) -> Loaded | None:
        """Read the checkpoint to resume from: rank 0 chooses it for all ranks."""
        return self._read_together(lambda read: self._attempt.plan.load(self._reject, read))

    def _read_together(self, search: Search) -> Loaded | None:
        """Return the checkpoint that a search on rank 0 finds, read by every rank of the run."""
        world, module = self._attempt.world, self._attempt.module

        def read(folder: Path) -> Loaded:
            return Loaded(folder, module, world.data_rank, world.data_size)

        return search(read) if world.size == 1 else read_together(world, read, search)

    def _reject(self, name: str, error: Exception) -> None:
        self._rejected.append((name, describe(error)))

    def _restore_again(self, loaded: Loaded) -> None:
        """Restore the state after the dataloader was created: the module may count its calls of that method."""
        if not takes_state_by_default(self._attempt.module):
            self._attempt.phase = "restoring the checkpoint"
            loaded.restore_module(self._attempt.module)

    def _restore(self, loaded: Loaded, optimization: Optimization) -> None:
        """Restore all of a checkpoint but the module and the position in the data."""
        attempt, scaler = self._attempt, self._attempt.precision.scaler
        attempt.phase = "restoring the checkpoint"
        if not attempt.arguments.reset_optimizers_schedulers:
            loaded.read_optimizers(optimization.optimizers)
            optimization.load_state_dict(loaded.optimization, str(loaded.folder))
            if scaler is not None and loaded.state["scaler"] is not None:
                scaler.load_state_dict(checked_scaler(scaler, loaded.state["scaler"], str(loaded.folder)))
        loaded.restore_callbacks(attempt.hooks.callbacks, attempt.fail_hook)
        attempt.recorder.load_state_dict(clone_tensors(loaded.state["metrics"]))
        if "readings" in loaded.parts:
            attempt.readback.restore(loaded.parts["readings"])
        loaded.forget()

    def validate(self) -> None:
        """Validate once, with the weights of a checkpoint or a file if there is one."""
        attempt, module = self._attempt, self._attempt.module
        self._shard()
        weights = self._load_weights("validated")
        loaders = self._evaluated("get_val_dataloaders", module.get_val_dataloaders, "validate")
        attempt.recorder.begin_validation(attempt.origin.global_step)
        with weights:
            self._make_evaluation().run(Stage.VAL, loaders, attempt.arguments.max_val_steps_per_epoch)

    def test(self) -> None:
        """Test, with the weights of a checkpoint or a file if there is one."""
        self._shard()
        weights = self._load_weights("tested")
        loaders = self._evaluated("get_test_dataloaders", self._attempt.module.get_test_dataloaders, "test")
        with weights:
            self.outputs = self._make_evaluation().run(Stage.TEST, loaders, None, keep=True)

    def _load_weights(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Load the weights that are evaluated; returns the block for the evaluation.

        Those of a checkpoint are averaged if an attached callback validates its average; without such a callback, if
        the checkpoint's run did. Without a checkpoint or file, the block applies the average of the callback.
        """
        attempt, plan, module = self._attempt, self._attempt.plan, self._attempt.module
        attempt.phase = "reading the checkpoint"
        loaded = self._loaded = self._read()
        if loaded is not None:
            loaded.restore_module(module, averaged=attempt.averaging.wanted)
            attempt.origin.global_step, attempt.origin.epoch = loaded.global_step, loaded.epoch
            loaded.forget()
        as_it_is = loaded is None and not plan.load_weights(module, self._read_together)
        if as_it_is and plan.resumes:
            logger.warning(f"there is no checkpoint to resume from: the module is {what} as it is")
        module.current_epoch = attempt.origin.epoch
        self.publish_started(None)
        return attempt.averaging.applied(self._checkpoints.stager.gate) if as_it_is else contextlib.nullcontext()

    def _evaluated(self, method: str, get: Callable[..., Any], task: str) -> dict[str, Any]:
        """Ask for the dataloaders of an evaluation, and start the ledger."""
        attempt = self._attempt
        attempt.phase = method
        batch_size = attempt.batching.evaluation_batch_size
        sampler = sequential_sampler(Shard(batch_size, attempt.world.data_rank, attempt.world.data_size))
        loaders = as_val_loaders(get(sampler, batch_size), method)
        if not loaders:
            raise ContractError(
                f"{type(attempt.module).__name__}.{method}() returned no dataloader: implement it to use"
                f" Trainer.{task}()"
            )
        attempt.ledger.start()
        return loaders

    def publish_started(self, steps: int | None, total: int | None = None) -> None:
        """Publish `RunStarted`.

        Args:
            steps: Of an epoch; None if that is unknown.
            total: Of the run.
        """
        origin, arguments = self._attempt.origin, self._attempt.arguments
        self.started = True
        kind, settings = type(self._attempt.module), self._attempt.plan.settings
        started = RunStarted(
            *origin.header(),
            module=f"{kind.__module__}.{kind.__qualname__}",
            epochs=arguments.epoch_limit,
            steps_per_epoch=steps,
            max_steps=arguments.max_steps,
            total_steps=total,
            arguments=arguments.to_dict(),
            device=str(self._attempt.device),
            **self._attempt.record.fields(),
            best=settings.best if settings is not None else None,
            best_mode=settings.best_mode if settings is not None else "min",
        )
        self._attempt.ring.publish(started)
        if self.on_started is not None:
            self.on_started()
        self._publish_ranks_ended()
        for name, error in self._rejected:
            self._attempt.ring.publish(CheckpointRejected(*origin.header(), checkpoint=name, error=error))

    def _publish_ranks_ended(self) -> None:
        """Publish how the other ranks have ended the attempt before, if its rank 0 has died and cannot have."""
        origin, store = self._attempt.origin, self._attempt.plan.store
        if origin.attempt == 1 or store is None or not self._attempt.world.leads:
            return
        for end in ends_of(store.folder.parent, origin.attempt - 1):
            ended = end.attempt, end.rank, end.host, end.status, end.reason, end.phase
            self._attempt.ring.publish(RankEnded(*origin.header(), *ended))

    def _publish_resumed(self, loaded: Loaded | None) -> None:
        """Training begins at another place than where the attempt before has ended.

        Not told by a test, nor by an attempt that fails before it begins: what has been trained stays as it is.
        """
        origin = self._attempt.origin
        if loaded is not None:
            in_line = self._attempt.plan.name_of(loaded) is not None
            # The repeated steps of earlier attempts are superseded: all of them, if this run resumes from a checkpoint
            # that belongs to another one.
            after_seq = loaded.manifest.seq if in_line else 0
            self._attempt.ring.publish(
                RunResumed(*origin.header(), checkpoint=str(loaded.manifest.name), after_seq=after_seq)
            )
        elif origin.attempt > 1:
            self._attempt.ring.publish(RunResumed(*origin.header(), checkpoint=None, after_seq=0))
