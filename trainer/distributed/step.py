"""One optimizer step of all ranks together."""

from __future__ import annotations

import contextlib

import torch

from trainer.data.rows import no_weight, sum_of
from trainer.distributed.strategy import AutomaticStrategy, ManualStrategy
from trainer.hooks.capture import Capture
from trainer.loop.boundary import Boundary
from trainer.loop.feed import MicroBatch
from trainer.loop.optimization import Optimization
from trainer.loop.step import Computed, Outputs, Step, StepOutcome

_EXACT = 1e-6
"""Maximum distance from 1 at which the parts of a step count as complete: the gradients need no correction."""


class RankStep(Step):
    """Takes the optimizer steps of a module that is distributed: gradients, loss and weight are those of all ranks."""

    def __init__(self, boundary: Boundary, optimization: Optimization, capture: Capture, *, clears: bool) -> None:
        super().__init__(boundary, optimization, capture, clears=clears)
        self._step_weight: float | torch.Tensor | None = None
        self._places: list[int] = []  # of the micro-batches that have a loss

    def _measure(self, outcome: StepOutcome, group: list[MicroBatch]) -> None:
        outcome.weight, outcome.places = self._step_weight, self._places

    def _check_weight(self, group: list[MicroBatch]) -> None:
        """A weight of 0 on this rank is that of the step only if no other rank has one: see `_is_counted`."""

    def _is_counted(self, weight: float, has_loss: bool) -> bool:
        """Whether the step has a weight on any rank."""
        if weight:
            return True
        if has_loss:
            raise no_weight(self._module, self._attempt.origin.global_step + 1)
        return False

    def _rows(self, group: list[MicroBatch], weight: float | torch.Tensor) -> int | None:
        """Note the weight of the step on all ranks; return its rows."""
        rows = group[0].all_rows
        if self._weigh is None and rows is not None:
            if isinstance(weight, float) and abs(weight - 1) > _EXACT:  # `train_step` returned None for the others
                rows = round(rows * weight)
            self._step_weight = rows
            return rows
        origin = self._attempt.origin
        self._step_weight = weight * self._attempt.arguments.rows_of_step(origin.epoch, origin.global_step)
        if rows is None and self._weigh is None and isinstance(self._step_weight, float):
            return round(self._step_weight)
        local = sum_of([one.rows for one in group])
        return rows if rows is not None else None if local is None else local * self._attempt.world.data_size

    def release(self) -> None:
        """Release the graph of the last step; a validation or the end of an epoch follows."""
        super().release()
        self._attempt.exchange.forget()


class AutomaticRankStep(RankStep):
    """The trainer computes the gradients of the micro-batches."""

    def __init__(
        self,
        boundary: Boundary,
        optimization: Optimization,
        capture: Capture,
        strategy: AutomaticStrategy,
        *,
        clears: bool,
    ) -> None:
        super().__init__(boundary, optimization, capture, clears=clears)
        self._strategy = strategy
        self._call = strategy.forward
        self._last = True

    def _measure(self, outcome: StepOutcome, group: list[MicroBatch]) -> None:
        self._strategy.settle()
        super()._measure(outcome, group)

    def _micro_steps(self, group: list[MicroBatch], keep: bool) -> Computed | None:
        """The micro-batches of one step; WAIT: in the backward pass of the last one, for all ranks.

        Those without a loss stay in ``group``: a repeated evaluation of it needs as many passes on each rank.
        """
        outputs: list[Outputs] = []
        dummies: list[Outputs] = []
        self._places = []
        has_loss = False
        for i, one in enumerate(group):
            self._last = i + 1 == len(group)
            context = contextlib.nullcontext() if self._last else self._strategy.accumulating()
            with context:
                self._strategy.expect(one.part, is_dummy=one.is_dummy)
                if one.is_dummy:
                    computed = self._compute_dummy(one, i)
                    dummies += [] if computed is None else [computed[1]]
                    continue
                if (computed := self._micro_step(one, one.part, i)) is None:
                    self._optimization.gradients.release()
                    self._pass_back(None, None, 0.0)
                else:
                    has_loss = True
                    outputs.append(computed[1])
                    self._places.append(i)
        # The weight of a step whose rows are known is 1, so that the optimizers need not wait for the other ranks.
        is_whole = self._weigh is None and group[0].all_rows is not None and self._optimization.reads_nothing
        (weight, loss), self._optimization.found = self._strategy.total(self._optimization.check, is_whole=is_whole)
        if isinstance(weight, float):
            if not self._is_counted(weight, has_loss):
                return None
            if abs(weight - 1) > _EXACT:
                self._optimization.scale_gradients(1 / weight)
                loss = loss / weight
        else:
            # SYNC: the loop must know whether any rank has a loss; those that have one do know.
            if not has_loss and not self._is_counted(float(weight), has_loss):
                return None
            self._optimization.scale_gradients(1 / weight)
            loss = loss / weight
        # A hook at the end of a step may change the weights: it must run on every rank, and gets the dummy's outputs.
        return loss, self._rows(group, weight), (outputs or dummies) if keep else None

    def _compute_dummy(self, one: MicroBatch, number: int) -> tuple[torch.Tensor, Outputs] | None:
        with self._attempt.recorder.unseen():
            computed = self._micro_step(one, 0.0, number)
            if computed is None:
                self._pass_back(None, None, 0.0)
        return computed

    def _backward(self, loss: torch.Tensor, one: MicroBatch, part: float | None) -> torch.Tensor:
        detached, part = loss.detach(), part or 0.0
        if not (part or one.is_dummy or self._strategy.always_together):
            # The weight that the module gave it: its loss may be a mean over nothing.
            self._pass_back(None, None, 0.0)
            return torch.zeros_like(detached)
        # A dummy has a backward pass, because the module's own code may exchange gradients in it.
        share = loss if part == 1 else loss * part
        scaled = share if self._attempt.precision.scaler is None else self._attempt.precision.scale(share)
        self._pass_back(scaled.reshape(()) if scaled.dim() else scaled, detached, part)
        return share.detach()

    def _pass_back(self, scaled: torch.Tensor | None, loss: torch.Tensor | None, part: float) -> None:
        """The backward pass of a micro-batch. WAIT: in that of the last one, for all ranks."""
        if self._last:
            self._attempt.exchange.begin()
        self._strategy.backward(scaled, loss, part, last=self._last)
        if self._last:
            self._attempt.exchange.end()


class ManualRankStep(RankStep):
    """The module computes the gradients in `train_step`."""

    def __init__(
        self,
        boundary: Boundary,
        optimization: Optimization,
        capture: Capture,
        strategy: ManualStrategy,
        *,
        clears: bool,
    ) -> None:
        super().__init__(boundary, optimization, capture, clears=clears)
        self._strategy = strategy
        assert self._manual is not None
        self._manual.strategy = strategy

    def _by_module(self, group: list[MicroBatch], keep: bool) -> StepOutcome:
        """One call of `train_step` on each rank; WAIT: in each of its updates, and for the step's loss."""
        one, strategy = group[0], self._strategy
        with strategy.weigh(one.part), self._attempt.recorder.unseen() if one.is_dummy else contextlib.nullcontext():
            self._attempt.exchange.begin()
            outcome = super()._by_module(group, keep)
            self._attempt.exchange.end()
        has_loss = outcome.loss is not None and not one.is_dummy
        weight, loss = strategy.mean(outcome.loss if has_loss else None)
        if self._is_counted(float(weight), has_loss):  # SYNC: the loop must know whether any rank has a loss
            outcome.loss, outcome.skipped = loss, None
        outcome.rows, self._places = self._rows(group, weight), [0] if has_loss else []
        if keep and outcome.outputs is None:
            outcome.outputs = []
        return outcome
