"""One optimizer step: forward and backward passes of its micro-batches, then the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import torch

from events.bus.backlog import Payload
from events.messages import BackwardEnded, NonFiniteGradient, NonFiniteLoss, StepSkipped
from trainer.data.rows import no_weight, shares_of, sum_of, weight_of
from trainer.errors import (
    REMEDY,
    NonFiniteGradientError,
    NonFiniteLossError,
    OptimizerError,
    StepOutputError,
)
from trainer.hooks.capture import Capture
from trainer.hooks.collate import as_tuple
from trainer.loop.boundary import Boundary
from trainer.loop.feed import MicroBatch
from trainer.loop.loss_checks import bad_loss, own_backward
from trainer.loop.manual import ManualSteps
from trainer.loop.optimization import ClosureWanted, Optimization, Skip
from trainer.module_interface import Stage

Outputs = tuple[Any, ...]


Computed = tuple[torch.Tensor, int | None, list[Outputs] | None]
"""The loss of a step, detached; its rows; the results of `train_step` that are kept."""


class _NoLoss(Exception):  # not an error: ends an optimizer's closure
    """`train_step` returned None for every batch of the step."""


class StepOutcome(msgspec.Struct, gc=False):
    """What a step has computed."""

    loss: torch.Tensor | None
    """A scalar ``()``, detached, that nothing changes any more; None if there is none."""
    rows: int | None
    outputs: list[Outputs] | None
    """Results of `train_step` per micro-batch, with their graphs; None if they are not kept."""
    lr: Any
    grad_norm: torch.Tensor | None = None
    bad_gradient: torch.Tensor | None = None
    """Positive if a gradient is not finite; None if the norm shows it, or the host has read it."""
    skipped: Skip | None = None
    places: Sequence[int] | None = None
    """With several ranks: the indices in the step of the micro-batches whose outputs these are."""
    weight: float | torch.Tensor | None = None
    """What the step counts in means; of several ranks with a device each perhaps a scalar ``()`` there."""


class Step:
    """Takes the optimizer steps of one module. On the thread of the loop.

    Args:
        clears: Clear the gradients at the end of a step. False: the caller does, after the hooks that look at them.
    """

    def __init__(self, boundary: Boundary, optimization: Optimization, capture: Capture, *, clears: bool) -> None:
        self._boundary = boundary
        self._attempt = attempt = boundary.attempt
        self._module = attempt.module
        self._checkpoints = boundary.checkpoints
        self._optimization = optimization
        self._capture = capture
        self._call: Callable[..., Any] = attempt.module
        self._weigh = weight_of(attempt.module)
        self._backward_hooks = attempt.hooks.inline[BackwardEnded]
        self._returned: Any = None
        self._is_checked = False  # whether the first forward pass has left no gradients
        self._manual: ManualSteps | None = None
        self._take: Callable[[list[MicroBatch], bool], StepOutcome] = (
            self._with_closure if optimization.wants_closure else self._automatic
        )
        if attempt.module.manual_optimization:
            self._manual = ManualSteps(
                boundary, optimization, on_backward=self._after_backward, on_skip=self.skip, gate=self._gate
            )
            self._take = self._by_module
        self._clears = clears and self._manual is None
        optimization.guard(self._check_caller)
        object.__setattr__(self._module, "_stagecast_manual", self._manual)  # not in the state dict

    @property
    def is_manual(self) -> bool:
        """Whether the module optimizes itself."""
        return self._manual is not None

    def run(self, group: list[MicroBatch], keep: bool) -> StepOutcome:
        """Take one step.

        Args:
            group: Its micro-batches. Those for which `train_step` returned None are removed.
            keep: Whether the outputs of `train_step` are wanted.

        Raises:
            StepOutputError: `train_step` returned something else than a loss that can be trained.
            NonFiniteError: A manual update was not finite, and the policy is to stop.
        """
        ledger = self._attempt.ledger
        ledger.enter("compute")
        if ledger.idle is not None:
            ledger.idle.begin()
        outcome = self._take(group, keep)
        self._measure(outcome, group)
        if self._clears:
            self._optimization.gradients.clear()
        if ledger.idle is not None:
            ledger.idle.end()
        ledger.steps += 1
        ledger.enter("publish")
        return outcome

    def release(self) -> None:
        """Release the graph of the last step, and the memory of its gradients."""
        self._returned = None
        self._optimization.gradients.release()

    def close(self) -> None:
        """Training has ended."""
        if self._manual is not None:
            self._manual.close()
        self._returned = self._manual = None
        vars(self._module).pop("_stagecast_manual", None)

    # --------------------------------------------------------------------------------- the ways to take one

    def _automatic(self, group: list[MicroBatch], keep: bool) -> StepOutcome:
        computed = self._micro_steps(group, keep)
        lr = self._optimization.learning_rate
        if computed is None:
            return StepOutcome(None, None, None, lr, skipped="no_loss")
        loss, rows, outputs = computed
        self._attempt.phase = "the optimizer step"
        self._gate()  # the device waits for a copy of the tensors that the optimizers change
        try:
            grad_norm, bad_gradient, skipped = self._optimization.step(loss)
        except ClosureWanted:
            self._attempt.recorder.discard()
            self._take = self._with_closure
            return self._with_closure(group, keep)
        return StepOutcome(loss, rows, outputs, lr, grad_norm, bad_gradient, skipped)

    def _with_closure(self, group: list[MicroBatch], keep: bool) -> StepOutcome:
        """One step of optimizers that compute the loss themselves, as often as they want, on the same micro-batches.

        The step's loss, its outputs and what it logs are those of the first evaluation. Every evaluation draws new
        random numbers (dropout) and updates running statistics (batch norm), as in a loop written by hand.
        """
        attempt, recorder, lr = self._attempt, self._attempt.recorder, self._optimization.learning_rate
        first: list[Computed] = []

        def evaluate() -> torch.Tensor:
            logged, recorder.values = recorder.values, []
            count = len(group)
            result = self._micro_steps(group, keep and not first)
            if first and len(group) < count:
                raise StepOutputError(
                    f"{type(self._module).__name__}.train_step() returned None for a batch for which it had returned a"
                    f" loss in the same step; {type(self._optimization.optimizers[0]).__name__} computes the loss"
                    f" several times, so decide by the batch alone"
                )
            if result is None:
                raise _NoLoss
            if first:
                recorder.values = logged
            else:
                first.append(result)
            attempt.phase = "the optimizer step"
            return result[0]

        self._gate()
        try:
            done = self._optimization.step_with_closure(evaluate)
        except _NoLoss:
            return StepOutcome(None, None, None, lr, skipped="no_loss")
        if done.skipped is None:
            self._optimization.schedules.after_step()
        return StepOutcome(*first[0], lr, done.grad_norm, done.found, done.skipped)

    def _by_module(self, group: list[MicroBatch], keep: bool) -> StepOutcome:
        """One call of `train_step`, which applies its losses itself."""
        assert self._manual is not None
        batch, rows, weight = group[0][:3]
        self._check_weight(group)
        lr = self._optimization.learning_rate
        self._attempt.recorder.weight = 1 if weight is None else weight
        values, grad_norm, bad_gradient = self._manual.step(batch)
        loss = values[0] if values else self._manual.loss
        if loss is None and not values:
            return StepOutcome(None, None, None, lr, skipped="no_loss")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise bad_loss(self._module, loss, values)
        loss = loss.detach().clone()
        if loss.dim():
            loss = loss.reshape(())
        self._attempt.phase = "the schedulers"
        if not self._manual.only_skipped:
            self._optimization.schedules.after_step()
        return StepOutcome(loss, rows, [values] if keep else None, lr, grad_norm, bad_gradient)

    # --------------------------------------------------------------------------------------- micro-batches

    def _micro_steps(self, group: list[MicroBatch], keep: bool) -> Computed | None:
        """The micro-batches of one step by their weights; those without a loss are removed from ``group``.

        Returns:
            The step's loss, its rows and the outputs to keep; None if no micro-batch has a loss.
        """
        if len(group) == 1:
            computed = self._micro_step(group[0], None, 0)
            if computed is None:
                group.clear()
                return None
            self._check_weight(group)
            return computed[0], group[0].rows, [computed[1]] if keep else None
        parts = shares_of([one.weight for one in group])
        counted: list[tuple[MicroBatch, float, torch.Tensor, Outputs]] = []
        for i, (one, part) in enumerate(zip(group, parts, strict=True)):
            if (computed := self._micro_step(one, part, i)) is not None:
                counted.append((one, part, *computed))
        if not counted:
            group.clear()
            return None
        shares = [share.reshape(()) for _, _, share, _ in counted]
        if len(counted) < len(group):  # the others are the whole step
            group[:] = [one for one, _, _, _ in counted]
            if total := sum(part for _, part, _, _ in counted):
                self._optimization.scale_gradients(1 / total)
                shares = [share / total for share in shares]
        self._check_weight(group)
        outputs = [values for _, _, _, values in counted] if keep else None
        return torch.stack(shares).sum(), sum_of([one.rows for one in group]), outputs

    def _measure(self, outcome: StepOutcome, group: list[MicroBatch]) -> None:
        outcome.weight = self._weight(group)

    def _weight(self, group: list[MicroBatch]) -> float | torch.Tensor | None:
        """What the step counts in means; None if that is not known."""
        return group[0].weight if len(group) == 1 else sum_of([one.weight for one in group])

    def _check_weight(self, group: list[MicroBatch]) -> None:
        if self._weigh is not None and not self._weight(group):
            raise no_weight(self._module, self._attempt.origin.global_step + 1)

    def _micro_step(self, one: MicroBatch, part: float | None, number: int) -> tuple[torch.Tensor, Outputs] | None:
        """Forward and backward of one micro-batch.

        Args:
            part: Its part of the step; None for all of it. One of 0 has no backward: a mean over nothing is NaN.
            number: Of the micro-batch in the step, from 0.

        Returns:
            Its share of the step's loss, detached, and its outputs; None if `train_step` returned None.
        """
        attempt, precision = self._attempt, self._attempt.precision
        step = attempt.origin.global_step + 1
        attempt.recorder.weight = 1 if one.weight is None else one.weight
        attempt.phase = "train_step"
        if precision.enabled:
            with precision.autocast():
                returned = self._call(Stage.TRAIN, step, one.batch, attempt.device)
        else:
            returned = self._call(Stage.TRAIN, step, one.batch, attempt.device)
        # The graph of the step before is released here, as in a loop written by hand. Between backward and optimizer it
        # would slow down the optimizer: by 5 us, measured with a tiny model.
        self._returned = returned
        if returned is None:
            self._leave_out(number)
            return None
        values = (returned,) if isinstance(returned, torch.Tensor) else as_tuple(returned)
        loss = values[0] if values else None
        if not isinstance(loss, torch.Tensor):
            raise bad_loss(self._module, loss, values)
        if not self._is_checked:  # once: it looks at every parameter
            self._is_checked = True
            if number == 0 and any(parameter.grad is not None for parameter in self._module.parameters()):
                raise own_backward(self._module)
        attempt.phase = "backward"
        self._optimization.gradients.release()
        try:
            share = self._backward(loss, one, part)
        except RuntimeError as error:
            # Checked only now: it costs a step without an error nothing.
            if loss.numel() != 1 or loss.is_complex() or not loss.requires_grad:
                raise bad_loss(self._module, loss, values) from None
            if "backward through the graph a second time" in str(error):
                raise own_backward(self._module) from error
            raise
        if (self._backward_hooks or BackwardEnded in attempt.ring.audience.wanted) and (part is None or part):
            self._after_backward(loss, number)
        return share, values

    def _backward(self, loss: torch.Tensor, one: MicroBatch, part: float | None) -> torch.Tensor:
        """Compute the gradients of a micro-batch; returns its share of the step's loss, detached."""
        if part == 0:
            return torch.zeros_like(loss.detach())
        precision = self._attempt.precision
        share = loss if part is None else loss * part
        (share if precision.scaler is None else precision.scale(share)).backward()  # type: ignore[no-untyped-call]
        share = share.detach()  # or the event would keep the graph alive
        # A module may keep its loss and change it in place, a compiled step may write the next one to the same memory.
        return share.clone() if part is None else share

    def _leave_out(self, number: int) -> None:
        """`train_step` returned None for a micro-batch."""
        if number == 0 and any(parameter.grad is not None for parameter in self._module.parameters()):
            raise own_backward(self._module)
        self._attempt.notice(
            f"{type(self._module).__name__}.train_step() returned None for a batch; such batches are left out of their"
            f" step, and a step without any other is skipped"
        )

    def _after_backward(self, loss: torch.Tensor, number: int) -> None:
        if self._backward_hooks:
            self._boundary.run_inline(self._backward_hooks, self._attempt.origin.global_step, loss)
        if BackwardEnded in self._attempt.ring.audience.wanted:
            self._publish_backward(loss, number)

    def _publish_backward(self, loss: torch.Tensor, number: int) -> None:
        boundary, ring = self._boundary, self._attempt.ring
        fence = payload = None
        with self._attempt.ledger.within("publish"):
            receivers = ring.audience.payload_receivers.get(BackwardEnded, ())
            if receivers:
                fence = boundary.fence(BackwardEnded)
                copy = self._capture.copy((loss,))
                payload = Payload(self._capture.of_step([copy], len(receivers) > 1), fence, copy.nbytes)
            header = self._attempt.origin.header()
            # By position, because it is built at every micro-batch.
            ring.publish(BackwardEnded(*header, loss.detach(), number), payload)  # type: ignore[arg-type]  # deferred
        if fence is not None:
            with self._attempt.within("on_end_backward"):
                boundary.wait_for_fence(fence)

    # ------------------------------------------------------------------------------------------- the policy

    def _gate(self) -> None:
        if self._checkpoints.stager.pending is not None:
            self._checkpoints.stager.gate()

    def _check_caller(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""
        if self._manual is not None:
            self._gate()
        elif self._attempt.phase == "train_step":
            raise OptimizerError(
                f"train_step() called {type(optimizer).__name__}.step() itself: return the loss and leave backward()"
                f" and the optimizers to the trainer, or set manual_optimization = True and call self.optimize(loss)"
            )

    def skip(self, reason: Skip, loss: torch.Tensor | None) -> None:
        """Report a skipped step.

        Raises:
            NonFiniteError: The policy is to stop, or too many steps in a row were skipped.
            StepOutputError: Too many steps in a row had no loss.
        """
        ring, origin, arguments = self._attempt.ring, self._attempt.origin, self._attempt.arguments
        position, step = self._checkpoints.position, origin.global_step + 1
        count = position.skipped_in_a_row = position.skipped_in_a_row + 1
        if count == 1:
            position.first_skipped = step
        stops = arguments.non_finite == "stop" and reason in ("non_finite_loss", "non_finite_gradient")
        action: Literal["skipped", "stopped"] = "stopped" if stops else "skipped"
        if reason == "non_finite_loss":
            event = NonFiniteLoss(*origin.header(), loss=loss, action=action, consecutive=count)  # type: ignore[arg-type]  # deferred
            ring.publish(event)
        elif reason == "non_finite_gradient":
            ring.publish(NonFiniteGradient(*origin.header(), action=action, consecutive=count))
        kind = NonFiniteLossError if reason == "non_finite_loss" else NonFiniteGradientError
        if stops:
            raise kind(f"{_CAUSES[reason]} of step {step} is NaN or infinite and non_finite='stop'; {REMEDY}")
        ring.publish(StepSkipped(*origin.header(), reason=reason))
        if count < arguments.max_skipped_steps:
            return
        if reason == "no_loss":
            raise StepOutputError(
                f"{count} steps in a row were skipped (max_skipped_steps), the first at step {position.first_skipped},"
                f" and train_step() returned None for each batch of the last one; return a loss for some"
            )
        raise kind(
            f"{count} steps in a row were skipped (max_skipped_steps), the first at step {position.first_skipped}:"
            f" {_CAUSES[reason]} is NaN or infinite; lower the learning rate, or look at the data of that step"
        )


_CAUSES: dict[Skip, str] = {
    "non_finite_loss": "the loss",
    "non_finite_gradient": "a gradient",
    "gradient_overflow": "a gradient in float16",
}
