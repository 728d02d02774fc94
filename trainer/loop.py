"""The training loop: synchronous, on one thread, publishing what it does and waiting only where it says so.

Read it from `TrainingLoop.run` down. Places where the loop may wait carry a comment that begins with ``WAIT``,
host-device synchronisation points one that begins with ``SYNC``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter_ns as clock
from typing import Any, Literal, TypeVar

import torch

from events.backlog import Payload
from events.log import logger
from events.messages import (
    BackwardEnded,
    NonFiniteGradient,
    NonFiniteLoss,
    StepSkipped,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
)
from events.metrics import TRAIN_EPOCH_LOSS
from trainer.arguments import TrainerArguments
from trainer.boundary import Boundary
from trainer.checkpointing import has_state
from trainer.collate import as_tuple
from trainer.data import (
    ShuffledSampler,
    as_val_loaders,
    data_rows,
    end_iteration,
    generators_of,
    has_live_workers,
    hides_epoch,
    iterate,
    keeps_workers,
    loader_length,
    make_train_sampler,
    set_epoch,
    state_of_order,
)
from trainer.errors import (
    REMEDY,
    EmptyDataLoader,
    NonFiniteGradientError,
    NonFiniteLossError,
    OptimizerError,
    StepOutputError,
)
from trainer.evaluation import END, Evaluation
from trainer.manual import ManualSteps
from trainer.module_interface import ModuleInterface, Stage
from trainer.optimization import ClosureWanted, Optimization, Skip
from trainer.outputs import Capture, Copy, EpochOutputs
from trainer.precision import Precision
from trainer.recorder import MetricRecorder, Value
from trainer.resume import Loaded, go_on
from trainer.rng import RngState, capture_rng, restore_rng
from trainer.rows import no_weight, row_counter, weight_of
from trainer.workers import Batches

Outputs = tuple[Any, ...]
_Count = TypeVar("_Count", int, float)
_Batch = tuple[Any, int | None, float | None]
"""A micro-batch, its rows and what it counts, where these are known."""
OwnStep = tuple[torch.Tensor, int | None, list[Outputs] | None, torch.Tensor | None, torch.Tensor | None, Skip | None]
"""A step's loss, rows, outputs to keep, gradient norm, check of the gradients, and why it was skipped."""


class TrainingLoop:
    """Trains one module. All methods run on the loop's thread."""

    def __init__(
        self,
        module: ModuleInterface,
        arguments: TrainerArguments,
        device: torch.device,
        *,
        precision: Precision,
        boundary: Boundary,
        evaluation: Evaluation,
        recorder: MetricRecorder,
    ) -> None:
        self.epochs_finished = 0
        self._module = module
        self._arguments = arguments
        self._device = device
        self._precision = precision
        self._boundary = boundary
        self._checkpoints = boundary.checkpoints
        self._position = boundary.checkpoints.position
        self._evaluation = evaluation
        self._recorder = recorder
        self._weigh = weight_of(module)
        self._capture = Capture(device, boundary.notice)
        hooks = boundary.hooks
        self._step_hooks = hooks.inline[TrainStepEnded]
        self._hooks_want_outputs = any(hook.wants_outputs for hook in self._step_hooks)
        self._backward_hooks = hooks.inline[BackwardEnded]
        self._fenced_steps = TrainStepEnded in hooks.fenced
        self._returned: Any = None
        self._manual: ManualSteps | None = None
        self._resumed: Loaded | None = None
        self._is_checked = False  # whether the first forward pass has left no gradients
        self._order: type[ShuffledSampler] | None = None  # what all samplers of the run derive from: it has the epoch
        self._recalled: Any = None  # the dataloader of the epoch before, if this process has not iterated it
        self._first_loader: Iterable[Any] | None = None
        self._iteration: tuple[Iterator[Any], Any] | None = None  # over the epoch's data, and the dataloader
        self._read_early: tuple[Any, type[ShuffledSampler], int] | None = None
        """A dataloader for which the module has iterated the sampler itself, that sampler's class, and how often."""
        self._state_of_order: torch.Tensor | None = None  # before the epoch that was iterated last
        self._warned: set[str] = set()
        self._generators: list[torch.Generator] = []  # those of the dataloader itself
        self._validation_rng: RngState | None = None  # for the validation that a resumed run is to finish

    def run(self, optimization: Optimization, resumed: Loaded | None = None) -> None:
        """Train until the data, a limit or a stop ends it. `ask_for_first_loader` comes before.

        Args:
            resumed: The checkpoint at whose place to go on; the state is there already, but for the random generators.

        Raises:
            StopRequested: a stop was taken.
        """
        self._optimization = optimization
        if before_step := self._boundary.hooks.before_step:
            origin = self._boundary.origin
            optimization.before_step = lambda: self._boundary.run_inline(before_step, origin.global_step)
        optimization.guard(self._check_step)
        if self._module.manual_optimization:
            self._manual = ManualSteps(
                self._module,
                self._device,
                self._arguments,
                precision=self._precision,
                boundary=self._boundary,
                optimization=optimization,
                recorder=self._recorder,
                on_backward=self._after_backward,
                on_skip=self._skip,
            )
        object.__setattr__(self._module, "_stagecast_manual", self._manual)  # not in the state dict
        self._resumed = resumed
        if not self._module.training:
            self._module.train()  # not where it is: the user may keep a submodule in eval mode, a frozen batch norm
        self.epochs_finished = self._boundary.origin.epoch
        limit = self._arguments.epoch_limit
        at_end = (limit is not None and self.epochs_finished >= limit) or self._at_max_steps
        if resumed is not None and self._position.phase == "begin" and at_end:
            step = self._boundary.origin.global_step
            logger.warning(
                f"nothing is left to train: the checkpoint is of step {step}, before epoch {self.epochs_finished};"
                f" raise epochs or max_steps, or start a new run from its weights with init_from="
            )
        for epoch in itertools.count(self.epochs_finished):
            if limit is not None and epoch >= limit:
                break
            if self._at_max_steps and self._position.phase == "begin":
                break
            self._boundary.origin.epoch = epoch
            if self._boundary.stop_wanted:
                self._boundary.take_commands()  # before another epoch begins
            self._train_epoch(epoch, self._next_loader(epoch))
            self.epochs_finished += 1
        self._take_last_checkpoint()

    def close(self) -> None:
        """End what is open, and let go of the data: an exception may keep this loop."""
        self._end_iteration()
        self._manual = self._recalled = self._read_early = self._first_loader = self._returned = None

    def _take_last_checkpoint(self) -> None:
        """Training is finished: its state is worth keeping, for who goes on with more epochs."""
        origin = self._boundary.origin
        epoch, origin.epoch = origin.epoch, self.epochs_finished
        try:
            self._checkpoints.at_end()
        finally:
            origin.epoch = epoch

    def recall_loader(self) -> None:
        """Resumed between two epochs: ask for the dataloader of the one before, as the run has done.

        A module may keep it for the epochs that follow, perhaps at a place of its own.
        """
        position, epoch = self._position, self._boundary.origin.epoch
        if epoch:
            loader: Any = self._ask_for_loader(epoch - 1)
            if position.loader_state is not None and has_state(loader):
                loader.load_state_dict(position.loader_state)
            self._recalled = loader

    def ask_for_first_loader(self) -> Iterable[Any]:
        """Ask for the dataloader of the first epoch. Those of later epochs are asked for when they begin."""
        self._first_loader = loader = self._train_loader(self._boundary.origin.epoch)
        return loader

    def _next_loader(self, epoch: int) -> Iterable[Any]:
        # No frame around the epoch refers to its dataloader: persistent workers end with it.
        loader, self._first_loader = self._first_loader, None
        return loader if loader is not None else self._train_loader(epoch)

    def _train_loader(self, epoch: int) -> Iterable[Any]:
        position = self._position
        if position.phase == "begin":
            if self._checkpoints.enabled:
                position.rng_at_loader = capture_rng(self._device)
            position.loader_state = None
        return self._ask_for_loader(epoch)

    def _ask_for_loader(self, epoch: int) -> Iterable[Any]:
        self._boundary.phase = "get_train_dataloader"
        mark = clock()
        self._order = self._order or make_train_sampler(self._position.sampler_seed, epoch)
        self._order.epoch = epoch
        # A class of its own each time: it counts the samplers that are made of it, and skips for one of them.
        sampler = make_train_sampler(self._position.sampler_seed, None, self._order)
        loader: Any = self._module.get_train_dataloader(sampler, self._arguments.micro_batch_size)
        self._warn_of_early_order(loader, sampler)
        loaders = as_val_loaders(loader if loader is not None else {}, "get_train_dataloader")
        if list(loaders) != ["default"]:
            raise EmptyDataLoader(
                f"get_train_dataloader() returned {loader!r}: return one dataloader, or any iterable of batches"
            )
        self._boundary.ledger.data += clock() - mark
        return loaders["default"]

    def steps_of(self, loader: Iterable[Any]) -> int | None:
        """Optimizer steps that an epoch with this dataloader takes; None if nobody can know."""
        limit = self._arguments.max_train_steps_per_epoch
        batches = loader_length(loader)
        if batches is None:
            return limit
        steps = -(-batches // self._arguments.accumulation_steps)  # the smaller last group is used, too
        return steps if limit is None else min(steps, limit)

    # ------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, epoch: int, loader: Iterable[Any]) -> None:
        """One epoch, step by step in plain sight.

        What a step costs beside the model is what these lines cost, so whatever can be looked up before the steps is.
        The ledger's times are chained: each ends at a ``mark`` where the next begins.
        """
        boundary, arguments = self._boundary, self._arguments
        optimization, recorder = self._optimization, self._recorder
        origin, ledger, control, bus = boundary.origin, boundary.ledger, boundary.control, boundary.bus
        step_hooks, fenced_steps = self._step_hooks, self._fenced_steps
        hooks_want_outputs = self._hooks_want_outputs
        gradients_are_looked_at = bool(step_hooks) or fenced_steps  # by a hook at the end of a step
        checkpoints, position = self._checkpoints, self._position
        began = position.began = time.monotonic()
        origin.stage = "train"
        limit_bytes = arguments.epoch_outputs_limit_bytes
        outputs = boundary.epoch_outputs(TrainEpochEnded, "on_end_train_epoch", limit_bytes)
        checkpoints.outputs, checkpoints.loader = outputs, loader
        self._generators = generators_of(loader)
        steps = self.steps_of(loader)
        if position.phase == "begin":
            position.first_step, position.batches, position.elapsed_s = origin.global_step, 0, 0.0
            position.used_up = position.judges_epoch = False
            recorder.begin_epoch()
            boundary.publish(TrainEpochStarted(*origin.header(), steps))
            optimization.find_strays()  # the hooks may have added parameters

        boundary.phase = "the training dataloader"
        mark = clock()
        weigh = self._weigh
        notice = boundary.notice if weigh is None else None  # nobody but `rows` in events depends on the count
        rows_of = row_counter(loader, arguments.micro_batch_size, ShuffledSampler, notice, "get_train_dataloader")
        follow_loss = self._follows_epoch_loss()
        batches = self._begin(loader, outputs)
        if position.phase != "end":
            optimization.train()  # a checkpoint holds the weights as they are evaluated
        if control.pending:
            boundary.take_commands()
        mark = clock()
        accumulation = arguments.accumulation_steps
        counts_itself = has_state(loader)
        val_interval = arguments.val_interval_steps
        limit = self._step_limit()
        first_step = position.first_step
        idle = ledger.idle
        manual = self._manual is not None
        own_step = self._manual_step if manual else self._closure_step if optimization.wants_closure else None
        read = position.batches
        step_ended = mark
        try:
            while limit is None or origin.global_step < limit:
                boundary.phase = "the training dataloader"
                batch = next(batches, END)  # WAIT: data
                if batch is END:
                    ledger.data += clock() - mark
                    self._use_up()
                    break
                rows = rows_of(batch, read)
                weight = rows if weigh is None else weigh(batch)
                read += 1
                group = None
                if accumulation > 1:
                    group = [(batch, rows, weight)]
                    batches.is_ahead = counts_itself
                    while len(group) < accumulation and (batch := next(batches, END)) is not END:  # WAIT: data
                        rows = rows_of(batch, read)
                        group.append((batch, rows, rows if weigh is None else weigh(batch)))
                        read += 1
                    batches.is_ahead = False
                    if batch is END:
                        self._use_up()
                observed = TrainStepEnded in bus.payload_receivers
                keep = observed or hooks_want_outputs or outputs is not None
                now = clock()
                ledger.data += now - mark
                # What came while the loop waited for data is taken before the step: not if it may ask for a checkpoint,
                # because the batch in hand is neither used nor unread.
                if control.pending and not checkpoints.enabled:
                    boundary.take_commands()
                    now = clock()

                mark, aside = now, ledger.aside
                ledger.begin_compute(mark)
                if idle is not None:
                    idle.begin()
                if group is not None:
                    weight = _sum([counts for _, _, counts in group])
                if weigh is not None and not weight:
                    raise no_weight(self._module, origin.global_step + 1)
                if own_step is not None:
                    lr = optimization.learning_rate
                    loss, rows, live, grad_norm, bad_gradient, skipped = own_step(
                        group or [(batch, rows, weight)], keep
                    )
                else:
                    if group is None:
                        loss, values = self._micro_step(batch, weight, None, 0)
                        live = [values] if keep else None
                        del values
                    else:
                        loss, rows, live = self._micro_steps(group, keep)
                    boundary.phase = "the optimizer step"
                    lr = optimization.learning_rate
                    if checkpoints.stager.pending is not None:
                        checkpoints.stager.gate()  # the device waits for a copy of what the optimizers will change
                    try:
                        grad_norm, bad_gradient, skipped = optimization.step(loss, ledger)
                    except ClosureWanted:
                        own_step = self._closure_step
                        recorder.discard()
                        loss, rows, live, grad_norm, bad_gradient, skipped = own_step(
                            group or [(batch, rows, weight)], keep
                        )
                if not gradients_are_looked_at and not manual:
                    optimization.zero_grad()
                if idle is not None:
                    idle.end()
                now = clock()
                ledger.end_compute(mark, now, aside)
                ledger.steps += 1

                if skipped is None:
                    origin.global_step = step = origin.global_step + 1
                    if not manual:
                        position.skipped_in_a_row = 0
                    if recorder.values:
                        recorder.take()
                    if follow_loss:
                        recorder.add_loss(loss, weight or 1)
                    event = TrainStepEnded(
                        origin.run_id,
                        origin.attempt,
                        0,
                        time.time(),
                        origin.rank,
                        step,
                        epoch,
                        "train",
                        loss,  # type: ignore[arg-type]  # deferred: read in a batch with others, off this thread
                        step - first_step,
                        rows,
                        (now - step_ended) / 1e9,
                        lr,
                        grad_norm,  # type: ignore[arg-type]  # deferred, too
                        bad_gradient,  # type: ignore[arg-type]  # deferred, too
                        None if weigh is None else weight,
                    )
                    step_ended = now
                    payload = None
                    if live is not None or fenced_steps:
                        same = loss if group is None and own_step is None else None
                        payload = self._payload(live, outputs, observed, same)
                    bus.publish(event, payload)
                    mark = clock()
                    ledger.publish += mark - now
                    if payload is not None and payload.fence is not None:
                        with boundary.within("on_end_train_step"):
                            boundary.wait_for_fence(payload.fence)
                        mark = clock()
                    if step_hooks:
                        boundary.run_inline_step(step_hooks, live if hooks_want_outputs else None)
                        mark = clock()
                else:
                    recorder.discard()
                    self._skip(skipped, loss)
                    mark = clock()
                    ledger.publish += mark - now
                if gradients_are_looked_at and not manual:
                    optimization.zero_grad()
                    now = clock()
                    ledger.compute += now - mark
                    mark = now
                position.batches = read
                if control.pending or bus.gated or mark > boundary.ledger_due:
                    mark = boundary.cross(mark)
                if val_interval is not None and origin.global_step % val_interval == 0:
                    self._validate_after(origin.global_step)
                    mark = step_ended = clock()
                if origin.global_step >= checkpoints.due_step or mark >= checkpoints.due_ns:
                    checkpoints.after_step(last=origin.global_step - first_step == steps)
                    mark = clock()
        finally:
            self._returned = None
            # Ends a dataloader's workers: before validation starts its own, and though an exception keeps this frame.
            mark = clock()
            del batches
            self._end_iteration()
            ledger.data += clock() - mark
        if read == 0 and position.phase == "train":
            cause = (
                "an iterator or generator is used up after one epoch: return a new one, or a DataLoader, each time"
                if epoch and iter(loader) is loader
                else f"the data set is empty, or drop_last left out its only batch (of fewer than"
                f" {arguments.micro_batch_size} rows)"
            )
            raise EmptyDataLoader(f"get_train_dataloader() gave no batch in epoch {epoch}: {cause}")
        if not position.used_up:
            checkpoints.loader = None  # its own place is one within the epoch, where nobody will go on
        position.phase = "end"
        position.loader_state = None
        self._note_generators()
        if self._validates_at_end(epoch):
            self._validate()
        duration_s = position.elapsed_s + time.monotonic() - began
        boundary.publish(TrainEpochEnded(*origin.header(), origin.global_step - first_step, duration_s), outputs)
        boundary.phase = "the schedulers"
        optimization.end_epoch()
        recorder.end_epoch()
        never_validates = arguments.val_interval_steps is None and not arguments.val_interval_epochs
        self._judge(recorder.epoch, epoch_loss=None if never_validates or position.judges_epoch else True)
        position.judges_epoch = False
        taken = origin.global_step - first_step
        planned = position.planned_steps + (position.steps_per_epoch or taken)
        position.planned_steps = origin.global_step if self._at_max_steps else planned
        self._note_generators()  # hooks may have drawn from them
        position.phase = "begin"
        checkpoints.outputs = None
        origin.epoch = epoch + 1  # where a checkpoint goes on
        checkpoints.after_epoch(epoch)
        origin.epoch = epoch

    def _begin(self, loader: Iterable[Any], outputs: EpochOutputs | None) -> Batches:
        """Begin to iterate over an epoch's data; in an epoch that is resumed, behind what was used of it."""
        position, resumed = self._position, self._resumed
        # Of a loader that the module keeps, too: persistent workers need that.
        assert self._order is not None
        self._order.epoch = self._boundary.origin.epoch
        set_epoch(loader, self._boundary.origin.epoch)
        recalled, self._recalled = self._recalled, None
        rows = data_rows(loader)
        if resumed is not None and position.data_rows is not None:
            again = rows if recalled is None else data_rows(recalled)  # the length may change from epoch to epoch
            if again != position.data_rows:
                when = "before" if position.phase == "begin" else "when"
                logger.warning(
                    f"the training data has the length {again} and had {position.data_rows} {when} the checkpoint was"
                    f" taken, so the run does not continue exactly; resume with the same data"
                )
        position.data_rows = rows
        if position.phase == "begin":
            self._resumed = None
            if recalled is not None:
                self._keep_generators(recalled, loader)
            self._warn_of_order(loader)
            sampler = getattr(loader, "sampler", None)
            if isinstance(sampler, ShuffledSampler):
                type(sampler).skip = 0  # one that was resumed where nothing was left to read has not skipped yet
            if self._checkpoints.enabled:
                position.rng_at_iter = capture_rng(self._device)
                self._note_generators()
                position.batching = self._arguments.micro_batch_size, self._arguments.accumulation_steps
            position.keeps_workers = has_live_workers(loader) or (loader is recalled and keeps_workers(loader))
            position.phase = "train"
            return self._iterate(loader, position.seed_of_workers(self._boundary.origin.epoch))
        assert resumed is not None
        self._resumed = None
        if outputs is not None and "outputs" in resumed.parts:
            outputs.restore(resumed.parts.pop("outputs"))
        elif outputs is not None and position.batches:
            logger.warning(
                "the checkpoint has no outputs of the epoch that is gone on with, because nobody wanted them then: who"
                " wants them now gets those from here on"
            )
        batches = Batches(self._boundary, lambda: iter(()))
        if position.phase == "end" or position.used_up:
            if position.loader_state is not None and has_state(loader):
                loader.load_state_dict(position.loader_state)  # type: ignore[attr-defined]  # `has_state` has looked
            self._keep_generators(loader, loader)
            self._recalled = loader
        else:
            mark = clock()
            position.rng_at_validation = resumed.rng  # what a checkpoint has to hold that is taken meanwhile
            epoch = self._boundary.origin.epoch
            check, iterate = self._take_commands, self._iterate
            batches = go_on(loader, position, epoch, self._arguments, self._device, check, iterate)  # WAIT: data
            position.rng_at_validation = None
            self._boundary.ledger.data += clock() - mark
        restore_rng(resumed.rng, self._device)
        resumed.parts.clear()
        interval, step = self._arguments.val_interval_steps, self._boundary.origin.global_step
        if position.phase != "train":
            self._validation_rng = resumed.rng
        if position.phase == "validate":
            self._validate()
            position.phase = "train"
            self._checkpoints.after_step(last=False)  # it may be the best one
        elif position.phase == "train" and interval is not None and step % interval == 0:
            self._validate_after(step)  # was due, and not done yet
            self._checkpoints.after_step(last=False)  # it may be the best one
        return batches

    def _iterate(self, loader: Any, seed: int | None) -> Batches:
        batches = Batches(self._boundary, lambda: iterate(loader, seed))
        self._iteration = batches.source, loader  # from here on, every way out ends it
        return batches

    def _end_iteration(self) -> None:
        iteration, self._iteration = self._iteration, None
        if iteration is not None:
            end_iteration(*iteration)

    def _use_up(self) -> None:
        """The data of the epoch has ended."""
        self._position.used_up = True
        self._note_generators()

    def _note_generators(self) -> None:
        if self._checkpoints.enabled:
            self._position.generators_at_iter = [generator.get_state() for generator in self._generators]

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
            self._warn_once(
                "get_train_dataloader() seeds the generator that shuffles in each epoch, so all epochs have the same"
                " order; seed it once, or use the given sampler"
            )
        if hides_epoch(loader):
            self._warn_once(
                f"set_epoch() of {type(loader.dataset).__name__} does not reach persistent workers, so they may repeat"
                f" the order of an earlier epoch; share its epoch with them in a tensor (share_memory_()), or set"
                f" persistent_workers=False"
            )

    def _warn_of_early_order(self, loader: Any, sampler: type[ShuffledSampler]) -> None:
        """Warn if the module keeps a dataloader whose order it has read when it made it."""
        if (early := self._read_early) is not None and loader is early[0] and not sampler.iterations:
            if early[1].iterations == early[2]:  # not in the epochs since, either
                self._warn_once(
                    "get_train_dataloader() keeps a dataloader but iterates the given sampler only when it makes it, so"
                    " all epochs have the same order; make a new dataloader for each epoch, or give it the sampler"
                )
            return
        self._read_early = (loader, sampler, sampler.iterations) if sampler.iterations else None

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)

    def _step_limit(self) -> int | None:
        """The ``global_step`` at which the epoch that begins now must end, whatever data is left."""
        arguments = self._arguments
        limits = [arguments.max_steps] if arguments.max_steps is not None else []
        if arguments.max_train_steps_per_epoch is not None:
            limits.append(self._position.first_step + arguments.max_train_steps_per_epoch)
        return min(limits, default=None)

    @property
    def _at_max_steps(self) -> bool:
        limit = self._arguments.max_steps
        return limit is not None and self._boundary.origin.global_step >= limit

    # --------------------------------------------------------------------------------------------- a step

    def _micro_steps(self, group: list[_Batch], keep: Any) -> tuple[torch.Tensor, int | None, list[Outputs] | None]:
        """The micro-batches of one step by their weights: the step's loss, its rows, the outputs to keep."""
        parts = _parts([weight for _, _, weight in group])
        shares: list[torch.Tensor] = []
        live: list[Outputs] = []
        for i, ((batch, _, weight), part) in enumerate(zip(group, parts, strict=True)):
            share, values = self._micro_step(batch, weight, part, i)
            shares.append(share.reshape(()))
            if keep:
                live.append(values)
        return torch.stack(shares).sum(), _sum([rows for _, rows, _ in group]), live if keep else None

    def _micro_step(
        self, batch: Any, counts: float | None, weight: float | None, micro_step: int
    ) -> tuple[torch.Tensor, Outputs]:
        """Forward and backward of one micro-batch; returns its share of the step's loss, detached, and its outputs.

        Args:
            counts: What the batch counts in means, where that is known.
            weight: Its part of the step; None for all of it. One of 0 has no backward: a mean over nothing is NaN.
        """
        boundary, precision = self._boundary, self._precision
        step = boundary.origin.global_step
        self._recorder.weight = 1 if counts is None else counts
        boundary.phase = "train_step"
        if precision.enabled:
            with precision.autocast():
                returned = self._module(Stage.TRAIN, step + 1, batch, self._device)
        else:
            returned = self._module(Stage.TRAIN, step + 1, batch, self._device)
        # The graph of the step before is taken apart here, as in a loop written by hand. Between backward and optimizer
        # it would slow down the optimizer: by 5 us, measured with a tiny model.
        self._returned = returned
        values = (returned,) if isinstance(returned, torch.Tensor) else as_tuple(returned)
        loss = values[0] if values else None
        if not isinstance(loss, torch.Tensor):
            raise _bad_loss(self._module, loss, values)
        if not self._is_checked:  # once: it looks at every parameter
            self._is_checked = True
            if micro_step == 0 and any(parameter.grad is not None for parameter in self._module.parameters()):
                raise _own_backward(self._module)
        if weight == 0:
            return torch.zeros_like(loss.detach()), values
        share = loss if weight is None else loss * weight
        boundary.phase = "backward"
        try:
            (share if precision.scaler is None else precision.scale(share)).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            # Looked at only now: it costs a step that is right nothing.
            if loss.numel() != 1 or loss.is_complex() or not loss.requires_grad:
                raise _bad_loss(self._module, loss, values) from None
            if "backward through the graph a second time" in str(error):
                raise _own_backward(self._module) from error
            raise
        if self._backward_hooks or BackwardEnded in boundary.bus.wanted:
            self._after_backward(loss, micro_step)
        share = share.detach()  # or the event would keep the graph alive
        # A module may keep its loss and change it in place, a compiled step may write the next one to the same memory.
        return share.clone() if weight is None else share, values

    def _closure_step(self, group: list[_Batch], keep: Any) -> OwnStep:
        """One step of optimizers that compute the loss themselves, as often as they want, on the same micro-batches.

        The step's loss, its outputs and what it logs are those of the first evaluation. Every evaluation draws new
        random numbers (dropout) and updates running statistics (batch norm), as in a loop written by hand.
        """
        boundary, recorder = self._boundary, self._recorder
        first: list[tuple[torch.Tensor, int | None, list[Outputs] | None]] = []

        def evaluate() -> torch.Tensor:
            logged, recorder.values = recorder.values, []
            outcome = self._micro_steps(group, keep and not first)
            if first:
                recorder.values = logged
            else:
                first.append(outcome)
            boundary.phase = "the optimizer step"
            return outcome[0]

        if self._checkpoints.stager.pending is not None:
            self._checkpoints.stager.gate()
        done = self._optimization.step_with_closure(evaluate, boundary.ledger)
        loss, rows, live = first[0]
        if done.skipped is None:
            self._optimization.after_step()
        return loss, rows, live, done.grad_norm, done.found, done.skipped

    def _manual_step(self, group: list[_Batch], keep: Any) -> OwnStep:
        """One call of `train_step`, which applies its losses itself."""
        assert self._manual is not None
        ((batch, rows, weight),) = group
        self._recorder.weight = 1 if weight is None else weight
        values, grad_norm, found = self._manual.step(batch)
        loss = values[0] if values else None
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise _bad_loss(self._module, loss, values)
        loss = loss.detach().reshape(()).clone()
        self._boundary.phase = "the schedulers"
        if not self._manual.only_skipped:
            self._optimization.after_step()
        return loss, rows, [values] if keep else None, grad_norm, found, None

    def _check_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""
        if self._manual is not None:
            if self._checkpoints.stager.pending is not None:
                self._checkpoints.stager.gate()
        elif self._boundary.phase == "train_step":
            raise OptimizerError(
                f"train_step() called {type(optimizer).__name__}.step() itself: return the loss and leave backward()"
                f" and the optimizers to the trainer, or set manual_optimization = True and call self.optimize(loss)"
            )

    def _after_backward(self, loss: torch.Tensor, micro_step: int) -> None:
        if self._backward_hooks:
            self._boundary.run_inline(self._backward_hooks, self._boundary.origin.global_step, loss)
        if BackwardEnded in self._boundary.bus.wanted:
            self._publish_backward(loss, micro_step)

    def _payload(
        self, live: list[Outputs] | None, outputs: EpochOutputs | None, observed: bool, loss: torch.Tensor | None
    ) -> Payload:
        """What goes beside a step's event: outputs for those who want them, and the fence.

        Args:
            loss: The event's, a copy of the only micro-batch's first output. Nobody changes it.
        """
        payload = Payload()
        if live is not None and (observed or outputs is not None):
            is_loss = False
            if loss is not None and type(loss) is torch.Tensor and len(live[0]) == 1 and loss.is_cpu:
                is_loss, copies = True, [Copy((loss,), loss.nbytes)]
            else:
                copies = [self._capture.take(values) for values in live]
            if outputs is not None:
                for copy in copies:
                    outputs.append(copy)
            if observed:
                shared = is_loss or outputs is not None
                shared = shared or len(self._boundary.bus.payload_receivers.get(TrainStepEnded, ())) > 1
                payload.outputs = self._capture.of_step(copies, shared)
                payload.nbytes = payload.outputs.nbytes
        if self._fenced_steps:
            payload.fence = self._boundary.fence(TrainStepEnded)
        return payload

    def _publish_backward(self, loss: torch.Tensor, micro_step: int) -> None:
        boundary = self._boundary
        mark = clock()
        fence = payload = None
        if BackwardEnded in boundary.bus.payload_receivers:
            fence = boundary.fence(BackwardEnded)
            copy = self._capture.take((loss,))
            shared = len(boundary.bus.payload_receivers.get(BackwardEnded, ())) > 1
            payload = Payload(self._capture.of_step([copy], shared), fence, copy.nbytes)
        event = BackwardEnded(*boundary.origin.header(), loss.detach(), micro_step)  # type: ignore[arg-type]  # deferred
        boundary.bus.publish(event, payload)
        spent = clock() - mark
        boundary.ledger.publish += spent
        boundary.ledger.aside += spent
        if fence is not None:
            with boundary.within("on_end_backward"):
                boundary.wait_for_fence(fence)

    def _skip(self, reason: Skip, loss: torch.Tensor) -> None:
        """A step was skipped.

        Raises:
            NonFiniteError: the policy is to stop, or this was one too many in a row.
        """
        bus, origin, arguments = self._boundary.bus, self._boundary.origin, self._arguments
        count = self._position.skipped_in_a_row = self._position.skipped_in_a_row + 1
        step = origin.global_step + 1
        if count == 1:
            self._position.first_skipped = step
        stops = arguments.non_finite == "stop" and reason != "gradient_overflow"
        action: Literal["skipped", "stopped"] = "stopped" if stops else "skipped"
        if reason == "non_finite_loss":
            event = NonFiniteLoss(*origin.header(), loss, action, count)  # type: ignore[arg-type]  # deferred
            bus.publish(event)
        elif reason == "non_finite_gradient":
            bus.publish(NonFiniteGradient(*origin.header(), action, count))
        kind = NonFiniteLossError if reason == "non_finite_loss" else NonFiniteGradientError
        if stops:
            raise kind(f"{_CAUSES[reason]} of step {step} is NaN or infinite and non_finite='stop'; {REMEDY}")
        bus.publish(StepSkipped(*origin.header(), reason))
        if count >= arguments.max_skipped_steps:
            raise kind(
                f"{count} steps in a row were skipped (max_skipped_steps), the first at step"
                f" {self._position.first_skipped}: {_CAUSES[reason]} is NaN or infinite; lower the learning rate, or"
                f" look at the data of that step"
            )

    # ----------------------------------------------------------------------------------------- validation

    def _validate_after(self, global_step: int) -> None:
        if global_step != self._position.validated_at:  # a step that was skipped right after does not validate again
            self._position.phase = "validate"
            self._validate()
            self._position.phase = "train"
            if self._boundary.stop_wanted:
                self._boundary.take_commands()  # at this very step

    def _validates_at_end(self, epoch: int) -> bool:
        arguments = self._arguments
        last = epoch + 1 == arguments.epoch_limit or self._at_max_steps
        if arguments.val_interval_steps is not None:  # the end is validated too, whatever the interval
            return last and self._position.validated_at != self._boundary.origin.global_step
        if not arguments.val_interval_epochs:
            return False
        return last or (epoch + 1) % arguments.val_interval_epochs == 0

    def _validate(self) -> None:
        """Validate; where that was interrupted, begin with the dataloader that was under way."""
        boundary, position = self._boundary, self._position
        if boundary.ledger.idle is not None:
            boundary.ledger.idle.forget()
        boundary.phase = "get_val_dataloaders"
        mark = clock()
        rng, self._validation_rng = self._validation_rng, None
        # Training goes on with these afterwards: what it computes does not depend on when it is validated.
        before = position.rng_at_val_loaders if rng is not None else None
        if before is not None:
            restore_rng(before, self._device)
        else:
            before = position.rng_at_val_loaders = capture_rng(self._device)
        own = [generator.get_state() for generator in self._generators]  # a validation's dataloader may share them
        loaders = as_val_loaders(
            self._module.get_val_dataloaders(
                torch.utils.data.SequentialSampler,
                self._arguments.evaluation_batch_size,
            )
        )
        boundary.ledger.data += clock() - mark
        if rng is not None:
            restore_rng(rng, self._device)
        if not position.validated_keys:
            self._recorder.begin_validation(boundary.origin.global_step)
        left = {key: loader for key, loader in loaders.items() if key not in position.validated_keys}
        if left:
            with self._optimization.evaluation(self._checkpoints.stager.gate):
                self._evaluation.run(
                    Stage.VAL,
                    left,
                    self._arguments.max_val_steps_per_epoch,
                    under_way=rng is not None,  # a checkpoint within a validation is taken between two of its batches
                    on_loader=self._on_val_loader,
                    on_done=self._on_validated,
                )
        position.rng_at_validation = position.rng_at_val_loaders = None
        position.validated_keys = []
        position.validated_at = boundary.origin.global_step
        boundary.phase = "the schedulers"
        if loaders:
            self._judge(self._recorder.validation, epoch_loss=False)
        else:
            position.judges_epoch = True
        restore_rng(before, self._device)
        for generator, state in zip(self._generators, own, strict=True):
            generator.set_state(state)

    def _judge(self, metrics: dict[str, Value], *, epoch_loss: bool | None) -> None:
        """Hand these metrics to all that follow one: schedulers, the best checkpoint, callbacks.

        Args:
            epoch_loss: Only to those that follow ``train_epoch_loss``; False: only to the others. None: to all.
        """
        recorder, ledger = self._recorder, self._boundary.ledger
        recorder.judged = metrics
        self._optimization.follow(ledger, epoch_loss=epoch_loss)
        if epoch_loss is None or epoch_loss == (self._checkpoints.best == TRAIN_EPOCH_LOSS):
            self._checkpoints.after_validation()
        self._boundary.ask_to_stop(epoch_loss=epoch_loss)
        if not epoch_loss:
            recorder.end_judging()

    def _follows_epoch_loss(self) -> bool:
        """Whether the loop itself needs the epoch's mean loss: otherwise it is computed where losses are read."""
        callbacks = self._boundary.hooks.callbacks
        return (
            self._optimization.follows_epoch_loss
            or self._checkpoints.best == TRAIN_EPOCH_LOSS
            or any(one.should_stop is not None and one.monitor in (None, TRAIN_EPOCH_LOSS) for one in callbacks)
        )

    def _take_commands(self) -> None:
        if self._boundary.control.pending:
            self._boundary.take_commands()

    def _on_val_loader(self, key: str) -> None:
        if self._checkpoints.enabled:
            self._position.rng_at_validation = capture_rng(self._device)

    def _on_validated(self, key: str) -> None:
        self._position.rng_at_validation = None
        self._position.validated_keys = [*self._position.validated_keys, key]


_CAUSES: dict[Skip, str] = {
    "non_finite_loss": "the loss",
    "non_finite_gradient": "a gradient",
    "gradient_overflow": "a gradient in float16",
}


def _parts(weights: list[float | None]) -> list[float]:
    """Each micro-batch's part of its step: equal ones where a weight is not known, or all are 0."""
    total = _sum(weights)
    return [(weight or 0) / total for weight in weights] if total else [1 / len(weights)] * len(weights)


def _sum(counts: Sequence[_Count | None]) -> _Count | None:
    """None if one of them is not known."""
    known = [count for count in counts if count is not None]
    return sum(known[1:], known[0]) if len(known) == len(counts) else None


def _bad_loss(module: ModuleInterface, loss: Any, values: Outputs) -> StepOutputError:
    where = f"{type(module).__name__}.train_step()"
    if not values:
        return StepOutputError(f"{where} returned nothing: return the loss tensor, or a tuple that begins with it")
    if not isinstance(loss, torch.Tensor):
        return StepOutputError(
            f"{where} returned a {type(loss).__name__} ({loss!r:.80}) as its first value: that must be the loss tensor"
        )
    if loss.numel() != 1:
        return StepOutputError(
            f"{where} returned a loss of shape {tuple(loss.shape)}: it must be one number; reduce it with .mean()"
        )
    if loss.is_complex():
        return StepOutputError(
            f"{where} returned a complex loss ({loss.dtype}): a loss must be real; return its .abs() or .real"
        )
    if any(parameter.grad is not None for parameter in module.parameters()) and loss.is_leaf:
        return _own_backward(module)
    return StepOutputError(
        f"{where} returned a loss that needs no gradient: it does not depend on a parameter that is trained, or was"
        f" detached, or was computed under torch.no_grad()"
    )


def _own_backward(module: ModuleInterface) -> StepOutputError:
    return StepOutputError(
        f"{type(module).__name__}.train_step() seems to have called backward() itself: return the loss and leave"
        f" backward() and the optimizers to the trainer, or set manual_optimization = True and call self.optimize(loss)"
    )
