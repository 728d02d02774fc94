"""The training loop: synchronous, on one thread; it publishes events, and waits only where ``WAIT`` marks it.

Read it from `TrainingLoop.run` down. Places where the loop may wait carry a comment that begins with ``WAIT``,
host-device synchronisation points one that begins with ``SYNC``.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from events.bus.backlog import Payload
from events.bus.fence import Fence
from events.log import logger
from events.messages import TrainEpochEnded, TrainEpochStarted, TrainStepEnded
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.position import Position
from trainer.data.rng import RngState, restore_rng
from trainer.errors import EmptyDataLoader
from trainer.hooks.capture import Capture, Copy, EpochOutputs
from trainer.hooks.signatures import requires_outputs
from trainer.loop.boundary import Boundary
from trainer.loop.evaluation import Evaluation
from trainer.loop.feed import Feed
from trainer.loop.optimization import Optimization
from trainer.loop.step import Step, StepOutcome
from trainer.loop.step_plan import EpochSize
from trainer.loop.validation import Validation


class TrainingLoop:
    """Trains one module. All methods run on the loop's thread.

    Attributes:
        epochs_finished: Those of earlier attempts included.
    """

    def __init__(self, boundary: Boundary, evaluation: Evaluation, feed: Feed, optimization: Optimization) -> None:
        self._boundary = boundary
        self._attempt = attempt = boundary.attempt
        self._checkpoints = boundary.checkpoints
        self._position: Position = boundary.checkpoints.position
        self._feed = feed
        self._optimization = optimization
        self.epochs_finished = attempt.origin.epoch
        self._capture = Capture(attempt.device, attempt.notice)
        self._validation = Validation(boundary, evaluation, optimization, feed)
        self._step_hooks = attempt.hooks.inline[TrainStepEnded]
        self._hooks_want_outputs = any(hook.wants_outputs for hook in self._step_hooks)
        self._observers_want_outputs = any(
            TrainStepEnded in one.observed for one in attempt.hooks.wanting_outputs(TrainStepEnded)
        )
        self._fenced_steps = TrainStepEnded in attempt.hooks.fenced
        # A hook at the end of a step may look at the gradients.
        self._clears_late = bool(self._step_hooks) or self._fenced_steps
        self._step = self._make_step(clears=not self._clears_late)
        self._clears_late = self._clears_late and not self._step.is_manual
        self._step_ended_ns = 0
        if before_step := attempt.hooks.beyond["on_before_optimizer_step"]:
            optimization.before_step = lambda: boundary.run_inline(before_step, attempt.origin.global_step)

    def _make_step(self, *, clears: bool) -> Step:
        strategy: Any = self._attempt.strategy
        if strategy is None:
            return Step(self._boundary, self._optimization, self._capture, clears=clears)
        # Late, because a single process does not need it.
        from trainer.distributed.step import AutomaticRankStep, ManualRankStep

        kind = ManualRankStep if self._attempt.module.manual_optimization else AutomaticRankStep
        return kind(self._boundary, self._optimization, self._capture, strategy, clears=clears)

    def run(self, resumed: Loaded | None = None) -> None:
        """Train until the data, a limit or a stop ends it. `Feed.ask_for_first_loader` comes before.

        Args:
            resumed: The checkpoint at whose place to continue; its state is restored already, except for the random
                generators.

        Raises:
            StopRequested: A stop was obeyed.
        """
        attempt, origin, position = self._attempt, self._attempt.origin, self._position
        if not attempt.module.training:
            attempt.module.train()  # else the user may keep a submodule in eval mode, a frozen batch norm
        limit = attempt.arguments.epoch_limit
        at_end = (limit is not None and origin.epoch >= limit) or attempt.is_at_max_steps
        if resumed is not None and position.phase == "begin" and at_end:
            logger.warning(
                f"nothing is left to train: the checkpoint is of step {origin.global_step}, before epoch"
                f" {origin.epoch}; raise epochs or max_steps, or start a new run from its weights with init_from="
            )
        self._boundary.limit_time(attempt.arguments.max_time_s)
        if not at_end and self._validation.at_start():
            self._wait_for(self._checkpoints.after_step(last=False))  # it may be the best one
        for epoch in itertools.count(self.epochs_finished):
            if limit is not None and epoch >= limit:
                break
            if attempt.is_at_max_steps and position.phase == "begin":
                break
            origin.epoch = epoch
            if self._boundary.stop_wanted:
                self._boundary.take_commands()  # before another epoch begins
            self._train_epoch(epoch, self._feed.next_loader(epoch), resumed)
            self.epochs_finished += 1
            resumed = None
        with origin.at_epoch(self.epochs_finished):
            self._validation.at_end()
            self._wait_for(self._checkpoints.at_end())

    def close(self) -> None:
        """Close open phases, and release the data: an exception may keep this loop."""
        self._feed.close()
        self._step.close()

    # ------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self, epoch: int, loader: Iterable[Any], resumed: Loaded | None) -> None:
        attempt, boundary, checkpoints = self._attempt, self._boundary, self._checkpoints
        feed, step, validation, position = self._feed, self._step, self._validation, self._position
        origin, ledger = attempt.origin, attempt.ledger
        began = position.began = time.monotonic()
        size = feed.plan.size_of(loader, epoch)
        steps = feed.plan.steps(size, epoch, position.first_step if position.phase != "begin" else origin.global_step)
        outputs = self._begin_epoch(loader, steps, feed.plan.run(size, epoch, origin.global_step)[0])
        validation.begin_epoch(loader, steps)
        follows_loss = validation.follows_epoch_loss
        interrupted: RngState | None = None
        outcome: StepOutcome | None
        try:
            if resumed is not None and position.phase != "begin":
                interrupted = self._resume_epoch(loader, resumed, outputs)
            else:
                feed.begin(loader, resumed=resumed is not None)
            if position.phase != "end":
                self._optimization.train()  # a checkpoint holds the weights as they are evaluated
            boundary.tick()
            limit = self._step_limit()
            self._step_ended_ns = ledger.since
            while origin.global_step < limit and (group := feed.read()) is not None:
                # A checkpoint could not be resumed here: the batches in hand are neither used nor unread.
                if not checkpoints.enabled:
                    boundary.glance()
                outcome = step.run(group, self._keeps(outputs))
                if outcome.skipped is None:
                    self._end_step(outcome, outputs, follows_loss)
                else:
                    attempt.recorder.discard()
                    step.skip(outcome.skipped, outcome.loss)
                if self._clears_late:
                    ledger.enter("compute")
                    self._optimization.gradients.clear()
                ledger.enter("other")
                position.batches = feed.taken
                boundary.cross()
                if validation.is_due:
                    if origin.global_step - position.first_step == steps:
                        attempt.averaging.end_epoch(origin.global_step)
                    step.release()
                    group = outcome = None  # a validation needs the memory
                    validation.after_step()
                    ledger.enter("other")
                    self._step_ended_ns = ledger.since
                if origin.global_step >= checkpoints.due.step or ledger.since >= checkpoints.due.ns:
                    self._wait_for(checkpoints.after_step(last=origin.global_step - position.first_step == steps))
        finally:
            step.release()
            group = outcome = None
            feed.end()  # also its workers: before validation starts its own
        if feed.taken == 0 and position.phase == "train":
            raise self._no_batch(epoch, loader)
        self._end_epoch(epoch, outputs, began, interrupted)

    def _begin_epoch(self, loader: Iterable[Any], steps: int | None, total: int | None) -> EpochOutputs | None:
        attempt, position = self._attempt, self._position
        attempt.origin.stage = "train"
        limit_bytes = attempt.arguments.epoch_outputs_limit_bytes
        outputs = self._boundary.epoch_outputs(TrainEpochEnded, "on_end_train_epoch", limit_bytes)
        self._checkpoints.outputs, self._checkpoints.loader = outputs, loader
        if position.phase == "begin":
            position.first_step, position.batches, position.elapsed_s = attempt.origin.global_step, 0, 0.0
            position.used_up = position.judges_epoch = False
            attempt.recorder.begin_epoch()
            self._boundary.publish(TrainEpochStarted(*attempt.origin.header(), steps=steps, total_steps=total))
            self._warn_of_other_steps(steps, total)
            self._optimization.gradients.find_strays()  # the hooks may have added parameters
        if attempt.strategy is not None:
            attempt.strategy.refresh()
        attempt.phase = "the training dataloader"
        return outputs

    def _warn_of_other_steps(self, steps: int | None, total: int | None) -> None:
        """Warn if schedulers were told another number of steps than the dataloader of this epoch gives."""
        told, epoch, planned = self._attempt.module.total_steps, self._attempt.origin.epoch, self._planned_steps
        if (
            None in (steps, told)
            or planned in (None, steps)
            or total == told
            or not self._optimization.schedules.per_step
        ):
            return
        self._attempt.notice(
            f"the length of the run has changed: epoch {epoch} has {steps} steps instead of {planned}, and schedulers"
            f" were told {told} steps in all, not {total}; change batch sizes with batch_size_schedule, or set"
            f" max_steps, if a schedule is to end with the run"
        )

    @property
    def _planned_steps(self) -> int | None:
        """Steps of this epoch by the plan of which schedulers were told."""
        position = self._position
        size = None if position.epoch_size is None else EpochSize(*position.epoch_size)
        return self._feed.plan.steps(size, self._attempt.origin.epoch, position.planned_steps)

    def _resume_epoch(self, loader: Any, resumed: Loaded, outputs: EpochOutputs | None) -> RngState | None:
        """Continue an epoch where a checkpoint was taken.

        Returns:
            The random generators of the validation at its end, if that is all that is left of it.
        """
        position, rng = self._position, resumed.rng
        if outputs is not None and resumed.has_outputs:
            outputs.restore(resumed.outputs, ranks=self._attempt.world.size)
        elif outputs is not None and position.batches:
            logger.warning(
                "this checkpoint holds no outputs for the current epoch: no hook asked for them; hooks get those of the"
                " steps from now on"
            )
        self._feed.resume(loader, rng)
        restore_rng(rng, self._attempt.device)
        resumed.parts.clear()
        if position.phase == "end":
            return rng
        if position.phase == "validate" or self._validation.is_due:  # was interrupted, or due and not done yet
            self._validation.after_step(rng if position.phase == "validate" else None)
            self._wait_for(self._checkpoints.after_step(last=False))  # it may be the best one
        return None

    def _end_epoch(self, epoch: int, outputs: EpochOutputs | None, began: float, interrupted: RngState | None) -> None:
        attempt, position, checkpoints = self._attempt, self._position, self._checkpoints
        origin = attempt.origin
        if not position.used_up:
            checkpoints.loader = None  # its own place is one within the epoch, where no run will resume
        attempt.averaging.end_epoch(origin.global_step)
        position.phase = "end"
        position.loader_state = None
        self._feed.note_generators()
        self._validation.after_epoch(epoch, interrupted)
        taken = origin.global_step - position.first_step
        duration_s = position.elapsed_s + time.monotonic() - began
        if attempt.recorder.objects.epoch:
            with attempt.ledger.within("readback"), attempt.within("compute() of a metric object"):
                attempt.recorder.compute_epoch()
        if attempt.world.size > 1:
            self._exchange(outputs)
        self._boundary.publish(TrainEpochEnded(*origin.header(), steps=taken, duration_s=duration_s), outputs)
        attempt.phase = "the schedulers"
        self._optimization.schedules.after_epoch()
        attempt.recorder.end_epoch()
        self._validation.judge_epoch()
        planned = position.planned_steps + (self._planned_steps or taken)
        position.planned_steps = origin.global_step if attempt.is_at_max_steps else planned
        self._feed.note_generators()  # hooks may have drawn from them
        position.phase = "begin"
        checkpoints.outputs = None
        with origin.at_epoch(epoch + 1):  # where a checkpoint resumes
            self._wait_for(checkpoints.after_epoch(epoch))

    def _exchange(self, outputs: EpochOutputs | None) -> None:
        """Put the outputs of all ranks together. WAIT: for all ranks, once per epoch."""
        from trainer.distributed.merged import Numbers, exchange_outputs  # late, as in `_make_step`

        world = self._attempt.world
        adopts = bool(self._attempt.hooks.wanting_outputs(TrainEpochEnded))
        everyone = world.gather(Numbers(None, True, outputs is not None, adopts, []))
        exchange_outputs(world, outputs, everyone)
        self._attempt.recorder.objects.agree(world.gather, evaluates=False)

    def _step_limit(self) -> int:
        """Return the maximum ``global_step`` of the starting epoch."""
        arguments = self._attempt.arguments
        limits = [arguments.max_steps] if arguments.max_steps is not None else []
        if arguments.max_train_steps_per_epoch is not None:
            limits.append(self._position.first_step + arguments.max_train_steps_per_epoch)
        return min(limits, default=sys.maxsize)

    def _no_batch(self, epoch: int, loader: Any) -> EmptyDataLoader:
        cause = (
            "an iterator or generator is used up after one epoch: return a new one, or a DataLoader, each time"
            if epoch and iter(loader) is loader
            else f"the data set is empty, or drop_last left out its only batch (of fewer than"
            f" {self._attempt.batching.micro_batch_of(epoch)} rows)"
        )
        return EmptyDataLoader(f"get_train_dataloader() gave no batch in epoch {epoch}: {cause}")

    def _wait_for(self, fence: Fence | None) -> None:
        if fence is not None:
            self._boundary.wait_for_fence(fence)  # WAIT: callbacks with hooks on both lanes

    # ------------------------------------------------------------------------------------- the end of a step

    def _keeps(self, outputs: EpochOutputs | None) -> bool:
        """Whether the outputs of the next step are wanted."""
        observed = self._observers_want_outputs and TrainStepEnded in self._attempt.ring.audience.payload_receivers
        return observed or self._hooks_want_outputs or outputs is not None

    def _end_step(self, outcome: StepOutcome, outputs: EpochOutputs | None, follows_loss: bool) -> None:
        """Publish a step that was taken, and run its hooks."""
        attempt, origin, position, recorder = (
            self._attempt,
            self._attempt.origin,
            self._position,
            self._attempt.recorder,
        )
        now, loss = attempt.ledger.since, outcome.loss
        assert loss is not None
        origin.global_step = step = origin.global_step + 1
        if not self._step.is_manual:
            position.skipped_in_a_row = 0
        if recorder.values:
            recorder.flush()
        if follows_loss:
            recorder.add_loss(loss, outcome.weight or 1)
        # By position, because it is built at every step: keywords would take half as long again.
        event = TrainStepEnded(
            origin.run_id,
            origin.attempt,
            0,
            time.time(),
            origin.rank,
            step,
            origin.epoch,
            "train",
            loss,  # type: ignore[arg-type]  # deferred: read in a batch with others, off this thread
            step - position.first_step,
            outcome.rows,
            (now - self._step_ended_ns) / 1e9,
            outcome.lr,
            outcome.grad_norm,  # type: ignore[arg-type]  # deferred, too
            outcome.bad_gradient,  # type: ignore[arg-type]  # deferred, too
            outcome.weight if self._feed.weighs else None,  # type: ignore[arg-type]  # deferred, too
        )
        self._step_ended_ns = now
        payload = None
        if outcome.outputs is not None or self._fenced_steps:
            payload = self._payload(outcome, outputs)
        attempt.ring.publish(event, payload)
        if payload is not None and payload.fence is not None:
            with attempt.within("on_end_train_step"):
                self._boundary.wait_for_fence(payload.fence)
        if self._step_hooks:
            live, hooks = outcome.outputs if self._hooks_want_outputs else None, self._step_hooks
            if live is not None and not live:  # `train_step` has returned None on this rank
                hooks = [hook for hook in hooks if not requires_outputs(hook.call)]
            self._boundary.run_inline_step(hooks, live)

    def _payload(self, outcome: StepOutcome, outputs: EpochOutputs | None) -> Payload:
        """Return the payload of a step's event: outputs, if an observer receives them, and the fence."""
        attempt, payload, live, loss = self._attempt, Payload(), outcome.outputs, outcome.loss
        if outcome.places is not None and not outcome.places:  # of a dummy
            outputs = None
        receivers = attempt.ring.audience.payload_receivers.get(TrainStepEnded, ())
        if live is not None and (receivers or outputs is not None):
            # Where the loss is the only output, the event's is a copy of it that never changes.
            only = live[0][0] if live and len(live) == len(live[0]) == 1 else None
            is_loss = loss is not None and loss.is_cpu and _alike(loss, only)
            if loss is not None and is_loss:
                copies = [Copy((loss,), loss.nbytes)]
            else:
                copies = [self._capture.copy(values) for values in live]
            if outputs is not None:
                if outcome.places is None:
                    for copy in copies:
                        outputs.append(copy)
                else:
                    for place, copy in zip(outcome.places, copies, strict=True):
                        outputs.append(copy, (attempt.origin.global_step, place))
            if receivers and self._observers_want_outputs:
                shared = is_loss or outputs is not None or len(receivers) > 1
                payload.outputs = self._capture.of_step(copies, shared)
                payload.nbytes = payload.outputs.nbytes
        if self._fenced_steps:
            payload.fence = self._boundary.fence(TrainStepEnded)
        return payload


def _alike(loss: torch.Tensor, output: Any) -> bool:
    return type(loss) is type(output) is torch.Tensor and loss.shape == output.shape and loss.dtype == output.dtype
