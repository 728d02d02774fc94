"""One optimizer step over all optimizers: unscale, clip, decide, step, schedule."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from trainer.distributed.local import local
from trainer.errors import OptimizerError
from trainer.loop.attempt import Attempt
from trainer.loop.gradients import Clearing, GradientCheck, clip_
from trainer.loop.optimizers import (
    as_optimizers,
    begins_with_closure,
    refuse_scaler,
    take_step,
    takes_closure,
    wants_closure,
)
from trainer.loop.saved_state import check_kinds, checked_optimizer, checked_scheduler, kinds_of, restore_optimizer
from trainer.loop.schedule import Schedules

Skip = Literal["non_finite_loss", "gradient_overflow", "non_finite_gradient", "no_loss"]


class ClosureWanted(Exception):  # not an error: the caller repeats the step with `step_with_closure`
    """An optimizer that was stepped without a closure needs one."""


class _Refused(Exception):  # not an error: ends an optimizer's closure
    """A loss or a gradient is not finite."""


@dataclasses.dataclass
class ClosureStep:
    """Result of a step with closures; norm and check are those of the first evaluation."""

    evaluations: int = 0
    grad_norm: torch.Tensor | None = None
    found: torch.Tensor | None = None
    skipped: Skip | None = None


class Optimization:
    """The optimizers and schedulers of a run, stepped together. Used on the loop's thread.

    Attributes:
        optimizers: In the order in which the module returned them.
        gradients: Clears them.
        before_step: Runs the hooks that look at the gradients that the optimizers are about to get.
        found: What the ranks have found in all gradients of the step, if they have checked them together already.
        wants_closure: Whether an optimizer computes the loss itself, several times per step: then all get a closure.

    Args:
        returned: What `ModuleInterface.get_optimizers_schedulers` returned.

    Raises:
        OptimizerError: It is not a pair of optimizers and schedulers.
    """

    def __init__(self, returned: Any, attempt: Attempt) -> None:
        self.optimizers, schedules = as_optimizers(returned)
        self.schedules = Schedules(schedules, attempt)
        self.before_step: Callable[[], None] | None = None
        self.wants_closure = any(wants_closure(optimizer) for optimizer in self.optimizers)
        if self.wants_closure:
            refuse_scaler(self.optimizers, attempt.precision)
        self._attempt = attempt
        self._precision = attempt.precision
        self.found: torch.Tensor | None = None
        self._guards = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.gradients = Clearing(self.optimizers, attempt.module, attempt.device)
        self._gradient_check = GradientCheck(
            in_turn=attempt.arguments.non_finite == "warn", shards=attempt.world.shards
        )
        self._switched: list[Any] = [
            one
            for one in self.optimizers
            if callable(getattr(one, "eval", None)) and callable(getattr(one, "train", None))
        ]
        self._evaluating = False

    @property
    def reads_nothing(self) -> bool:
        """Whether optimizers step without a number of the step being read on the host."""
        return (
            not self.wants_closure and self._precision.scaler is None and self._attempt.arguments.non_finite == "warn"
        )

    @property
    def learning_rate(self) -> Any:
        """Learning rate of the first parameter group: a float, or a tensor if the optimizer keeps one."""
        lr = self.optimizers[0].param_groups[0]["lr"]
        # Cloned: a scheduler changes it in place before the value is read.
        return lr if type(lr) is float else lr.detach().clone() if isinstance(lr, torch.Tensor) else float(lr)

    def guard(self, check: Callable[[torch.optim.Optimizer, Any, Any], None]) -> None:
        """Call ``check(optimizer, args, kwargs)`` before any step of an optimizer, by any caller."""
        self._handles += [optimizer.register_step_pre_hook(check) for optimizer in self.optimizers]
        self._guards += 1

    def train(self) -> None:
        """Switch the optimizers that have ``eval()`` and ``train()`` to training."""
        for optimizer in self._switched:
            optimizer.train()

    @contextlib.contextmanager
    def evaluation(self, gate: Callable[[], None]) -> Iterator[None]:
        """Switch the optimizers that have ``eval()`` and ``train()`` to evaluation: they may change the weights.

        Args:
            gate: Has the device wait for a copy of the weights that is under way.
        """
        if not self._switched or self._evaluating:
            yield
            return
        gate()
        self._evaluating = True
        for optimizer in self._switched:
            optimizer.eval()
        try:
            yield
        finally:
            self._evaluating = False
            gate()
            self.train()

    def close(self, gate: Callable[[], None]) -> None:
        """Clear the gradients at the end of the run, and leave the weights in evaluation mode."""
        self.gradients.close()
        if self._switched:
            gate()
            for optimizer in self._switched:
                optimizer.eval()
        for handle in self._handles:
            handle.remove()
        self.before_step = None

    def step(self, loss: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, Skip | None]:
        """Apply the gradients that were accumulated.

        Args:
            loss: The step's loss, detached.

        Returns:
            The gradients' norm before clipping if they are clipped, on the device; a number on the device that is
            positive if a gradient is not finite, where the norm does not show it and the host has not read it; and why
            the step was skipped, or None.
        """
        grad_norm, found, skipped = self._prepare(loss, self.optimizers)
        if skipped is None:
            if self.before_step is not None:
                self.before_step()
            for number, optimizer in enumerate(self.optimizers):
                try:
                    take_step(optimizer, self._guards)
                except Exception as error:
                    if "closure" not in str(error):
                        raise
                    raise self._want_closure(number) from error
            self.schedules.after_step()
        if self._precision.scaler is not None:
            self._precision.update()
        return grad_norm, found, skipped

    def update(
        self, optimizer: torch.optim.Optimizer, loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Skip | None]:
        """Apply the gradients of one optimizer's parameters, then clear all gradients; returns as `step` does."""
        grad_norm, found, skipped = self._prepare(loss, [optimizer])
        if skipped is None:
            if self.before_step is not None:
                self.before_step()
            take_step(optimizer, self._guards)
        if self._precision.scaler is not None:
            self._precision.update()
        self.gradients.clear()
        return grad_norm, found, skipped

    def step_with_closure(
        self,
        evaluate: Callable[[], torch.Tensor],
        optimizers: list[torch.optim.Optimizer] | None = None,
    ) -> ClosureStep:
        """Step each optimizer in turn with a closure that computes the loss and its gradients.

        As in ``for optimizer in optimizers: optimizer.step(closure)``, with an evaluation before a step whose closure
        is optional and which is not torch's: it may begin with the gradients that are there. Each evaluation clears all
        gradients, runs ``evaluate`` and clips. A loss or gradient that is not finite is refused where ``non_finite``
        says so, and the parameters and optimizers are set back to the state before the step.

        Args:
            evaluate: Runs the forward and backward passes of the step with gradients enabled; returns the loss,
                detached.
            optimizers: Those to be stepped; None: all.

        Raises:
            OptimizerError: The run uses float16, or an optimizer does not call the closure.
        """
        optimizers = self.optimizers if optimizers is None else optimizers
        refuse_scaler(optimizers, self._precision)
        done = ClosureStep()
        before = self._copy() if self._attempt.arguments.non_finite != "warn" else None

        def closure() -> torch.Tensor:
            self.gradients.clear()
            with torch.enable_grad():
                loss = evaluate()
            grad_norm, found, skipped = self._prepare(loss, optimizers)
            done.evaluations += 1
            if done.evaluations == 1:
                done.grad_norm, done.found = grad_norm, found
            if skipped is not None:
                done.skipped = skipped
                raise _Refused
            if self.before_step is not None:
                self.before_step()
            return loss

        try:
            for optimizer in optimizers:
                if not begins_with_closure(optimizer):
                    closure()
                if takes_closure(optimizer):
                    optimizer.step(closure)  # type: ignore[arg-type]  # a tensor works as a float does
                else:
                    optimizer.step()
                if not done.evaluations:
                    raise OptimizerError(f"{type(optimizer).__name__}.step(closure) did not call the closure")
        except _Refused:
            assert before is not None
            self._put_back(before)
        return done

    def _copy(self) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        held = [p.detach().clone() for o in self.optimizers for g in o.param_groups for p in g["params"]]
        return held, [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]

    @torch.no_grad()
    def _put_back(self, before: tuple[list[torch.Tensor], list[dict[str, Any]]]) -> None:
        values, states = before
        held = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        for parameter, value in zip(held, values, strict=True):
            parameter.copy_(value)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            restore_optimizer(optimizer, state)

    def _want_closure(self, number: int) -> Exception:
        """Give an optimizer that refused a step without a closure one from now on."""
        kind = type(self.optimizers[number]).__name__
        if number:  # earlier optimizers have stepped
            return OptimizerError(
                f"{kind}.step() needs a closure: return it as the first optimizer of get_optimizers_schedulers()"
            )
        refuse_scaler(self.optimizers[:1], self._precision)
        self.wants_closure = True
        return ClosureWanted()

    def _prepare(
        self, loss: torch.Tensor, optimizers: list[torch.optim.Optimizer]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Skip | None]:
        """Unscale and clip the gradients, and decide whether to apply them."""
        grad_norm: torch.Tensor | None = None
        found: torch.Tensor | None = None
        scaled = self._precision.scaler is not None
        if scaled:
            self._precision.unscale_(optimizers)
            found = self._precision.found_inf(optimizers)
        if self._attempt.arguments.clip_grads:
            parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
            grad_norm = clip_(parameters, self._attempt.arguments.max_grad_norm)
        elif not scaled:
            found, self.found = self.found, None
            if found is None:
                found = self._gradient_check.find(_gradients(optimizers))
        # A float16 scaler decides on the host whether the optimizers step, and so does the policy that skips. On the
        # CPU there is no device to wait for, so "stop" can stop before the weights are harmed.
        policy = self._attempt.arguments.non_finite
        if scaled or policy == "skip" or (policy == "stop" and loss.is_cpu):
            return grad_norm, None, self._read(loss, grad_norm, found)
        return grad_norm, found, None

    def check(self) -> torch.Tensor | None:
        """Look for gradients that are not finite in this rank's part of them, as `GradientCheck.find_here`.

        Returns:
            None also where `step` unscales or clips the gradients, which shows it.
        """
        if self._attempt.arguments.clip_grads or self._precision.scaler is not None:
            return None
        return self._gradient_check.find_here(_gradients(self.optimizers))

    def _read(self, loss: torch.Tensor, grad_norm: torch.Tensor | None, found: torch.Tensor | None) -> Skip | None:
        """Return whether all optimizers skip the step."""
        check = grad_norm if found is None else found
        scaler = self._precision.scaler
        scale = None if scaler is None else scaler._get_scale_async()
        with self._attempt.ledger.within("readback"):
            if check is None:  # there are no gradients
                numbers = [loss.item(), 0.0]  # SYNC: as below
            elif check.is_cpu and not loss.is_cpu:
                numbers = [loss.item(), check.item()]  # SYNC: as below; the check itself is on the host already
            else:
                each = [one.to(loss.device) for one in (check, scale) if one is not None]
                both = torch.stack((loss.reshape(()), *each))
                numbers = both.tolist()  # SYNC: the loop must decide whether to skip the step (float16, skip, stop)
        bad = numbers[1] > 0 if found is not None else not math.isfinite(numbers[1])
        if not math.isfinite(numbers[0]) and (bad or self._attempt.arguments.non_finite != "warn"):
            return "non_finite_loss"
        if not bad:
            return None
        # A scale of 1 or less causes no overflow, so the gradient itself is not finite in float16.
        is_scaled = len(numbers) > 2 and numbers[2] > 1
        return "gradient_overflow" if is_scaled else "non_finite_gradient"

    def scale_gradients(self, factor: float | torch.Tensor) -> None:
        """Multiply the gradients in place."""
        for gradient in _gradients(self.optimizers):
            local(gradient).mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimizers and schedulers, not copied."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": self.schedules.state(),
            "kinds": kinds_of(self.optimizers, self.schedules.schedulers),
        }

    def load_state_dict(self, state: dict[str, Any], where: str) -> None:
        """Restore the result of `state_dict`.

        Args:
            where: Of what checkpoint, for messages.

        Raises:
            CheckpointMismatch: it is that of other optimizers or schedulers; none of them was changed.
        """
        schedulers = state["schedulers"]
        check_kinds(self.optimizers, self.schedules.schedulers, state, where)
        optimizers = [
            checked_optimizer(optimizer, saved, f"{where}: optimizer {number}")
            for number, (optimizer, saved) in enumerate(zip(self.optimizers, state["optimizers"], strict=True))
        ]
        schedulers = [
            checked_scheduler(scheduler, saved, where)
            for scheduler, saved in zip(self.schedules.schedulers, schedulers, strict=True)
        ]
        for optimizer, checked in zip(self.optimizers, optimizers, strict=True):
            restore_optimizer(optimizer, checked)
            # It has stepped in an earlier process; otherwise torch would warn that its scheduler steps first.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        self.schedules.load_state(schedulers, where)


def _gradients(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    return [p.grad for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
