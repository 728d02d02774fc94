"""Manual optimization: the module calls `ModuleInterface.optimize` in `train_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from events.log import logger
from trainer.distributed.strategy import ManualStrategy
from trainer.errors import ArgumentsError, ContractError
from trainer.hooks.collate import as_tuple
from trainer.loop.boundary import Boundary
from trainer.loop.optimization import Optimization, Skip
from trainer.loop.optimizers import wants_closure
from trainer.module_interface import Stage

_MOST_IDLE_STEPS = 100
"""Steps without an update before a warning, unless the run ends earlier: gradients may be accumulated."""


class ManualSteps:
    """Runs `train_step` of a module with ``manual_optimization``, and its calls of `ModuleInterface.optimize`.

    On the loop's thread.

    Args:
        on_backward: Runs the hooks and publishes the event of a backward pass: its loss and number within the step.
        on_skip: Reports a skipped update: its reason and its loss. Raises to end the run.
        gate: Has the device wait for a copy of the weights that is under way.

    Raises:
        ArgumentsError: The step is split into micro-batches.
    """

    def __init__(
        self,
        boundary: Boundary,
        optimization: Optimization,
        *,
        on_backward: Callable[[torch.Tensor, int], None],
        on_skip: Callable[[Skip, torch.Tensor], None],
        gate: Callable[[], None],
    ) -> None:
        self._attempt = boundary.attempt
        arguments = self._attempt.arguments
        if arguments.accumulates:
            by = "gpu_batch_size_limit" if arguments.gpu_batch_size_limit is not None else "batch_size_schedule"
            raise ArgumentsError(
                f"{by}={getattr(arguments, by)} splits a step into several micro-batches, but with manual_optimization"
                f" each train_step is a step; remove it, and accumulate in train_step"
            )
        self._position = boundary.checkpoints.position
        self._optimization = optimization
        self._on_backward = on_backward
        self._on_skip = on_skip
        self._gate = gate
        self._in_step = False
        self.loss: torch.Tensor | None = None
        """The loss of the last update in the last call of `train_step`, detached; None without updates."""
        self.strategy: ManualStrategy | None = None
        """How the ranks of the run average gradients; None in a single process."""
        self._updates = self._skips = 0
        self._backwards = 0
        self._grad_norm: torch.Tensor | None = None
        self._found: torch.Tensor | None = None
        self._idle_steps: int | None = 0  # until an optimizer has stepped
        self._hooks = [one.register_step_post_hook(self._notice_step) for one in optimization.optimizers]

    @property
    def only_skipped(self) -> bool:
        """Whether the last call of `train_step` had updates, and all were skipped: schedulers stay, too."""
        return self._skips > 0 and not self._updates

    def close(self) -> None:
        """Training has ended: warn if no optimizer has stepped."""
        self._warn_if_idle()
        self._notice_step()

    def _notice_step(self, *_: Any) -> None:
        self._idle_steps = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _warn_if_idle(self) -> None:
        if self._idle_steps:
            logger.warning(
                f"{type(self._attempt.module).__name__}.train_step() has applied no loss in {self._idle_steps} steps;"
                f" call self.optimize(loss) in it"
            )
            self._notice_step()  # warns once

    def step(self, batch: Any) -> tuple[tuple[Any, ...], torch.Tensor | None, torch.Tensor | None]:
        """Call `train_step`; return its outputs, the last gradient norm, and a check of all gradients."""
        self._backwards = self._updates = self._skips = 0
        self._grad_norm = self._found = self.loss = None
        step = self._attempt.origin.global_step + 1
        self._attempt.phase = "train_step"
        self._in_step = True
        try:
            if self._attempt.precision.enabled:
                with self._attempt.precision.autocast():
                    returned = self._attempt.module(Stage.TRAIN, step, batch, self._attempt.device)
            else:
                returned = self._attempt.module(Stage.TRAIN, step, batch, self._attempt.device)
        finally:
            self._in_step = False
        if self._idle_steps is not None and not self._backwards:
            self._idle_steps += 1
            if self._idle_steps == _MOST_IDLE_STEPS:
                self._warn_if_idle()
        values = (returned,) if isinstance(returned, torch.Tensor) else as_tuple(returned)
        return values, self._grad_norm, self._found

    def optimize(
        self,
        loss: torch.Tensor | None,
        optimizer: int | torch.optim.Optimizer,
        closure: Callable[[], torch.Tensor] | None,
        retain_graph: bool,
    ) -> bool:
        """See `ModuleInterface.optimize`."""
        if not self._in_step:
            raise ContractError("optimize() was called outside of train_step; call it within train_step")
        own = self._optimization.optimizers
        known = isinstance(optimizer, int) and 0 <= optimizer < len(own)
        chosen = own[optimizer] if known else self._chosen(optimizer)  # type: ignore[index]
        if loss is None or closure is not None or self._optimization.wants_closure:
            _check_closure(chosen, loss, closure)
        kind = self._attempt.device.type
        is_cast = torch.is_autocast_enabled(kind)  # by the run or the user
        if is_cast:  # entering the context takes 10 us
            with torch.autocast(kind, enabled=False):
                loss, skipped = self._update(chosen, loss, closure, retain_graph)
        else:
            loss, skipped = self._update(chosen, loss, closure, retain_graph)
        if is_cast or self._attempt.precision.enabled:
            torch.clear_autocast_cache()  # it holds copies of the old weights
        self._attempt.phase = "train_step"
        self.loss = loss
        if skipped is None:
            self._updates += 1
            self._position.skipped_in_a_row = 0
            return True
        self._skips += 1
        self._on_skip(skipped, loss)
        return False

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        loss: torch.Tensor | None,
        closure: Callable[[], torch.Tensor] | None,
        retain_graph: bool,
    ) -> tuple[torch.Tensor, Skip | None]:
        """Return the loss, detached, and why the update was skipped."""
        if closure is not None:
            return self._with_closure(optimizer, closure)
        loss = self._backward(loss, retain_graph, optimizer)
        self._attempt.phase = "the optimizer step"
        self._gate()  # the device waits for a copy of the tensors that the optimizer changes
        grad_norm, found, skipped = self._optimization.update(optimizer, loss)
        if skipped is None:  # else `on_skip` reports it
            self._note(grad_norm, found)
        return loss, skipped

    def _with_closure(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, Skip | None]:
        first: list[torch.Tensor] = []

        def evaluate() -> torch.Tensor:
            self._attempt.phase = "train_step"
            # float16 takes no closure.
            with torch.autocast(
                self._attempt.device.type, dtype=torch.bfloat16, enabled=self._attempt.precision.enabled
            ):
                loss = closure()
            loss = self._backward(loss, False, optimizer)
            self._attempt.phase = "the optimizer step"
            first.append(loss)
            return first[-1]

        done = self._optimization.step_with_closure(evaluate, [optimizer])
        self._optimization.gradients.clear()
        if done.skipped is None:
            self._note(done.grad_norm, done.found)
        return first[0], done.skipped

    def _backward(self, loss: Any, retain_graph: bool, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Compute the gradients of a loss; return it detached. With several ranks: means over them, for this optimizer.

        WAIT: for all ranks.
        """
        if not isinstance(loss, torch.Tensor):
            raise _bad_loss(loss)
        self._attempt.phase = "backward"
        self._optimization.gradients.release()
        try:
            self._attempt.precision.scale(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        except RuntimeError:
            # Checked only now: it costs an update without an error nothing.
            if loss.numel() != 1 or loss.is_complex() or not loss.requires_grad:
                raise _bad_loss(loss) from None
            raise
        strategy = self.strategy
        if strategy is None or strategy.part:
            self._on_backward(loss, self._backwards)
        self._backwards += 1
        if strategy is None:
            return loss.detach()
        return strategy.average([one for group in optimizer.param_groups for one in group["params"]], loss.detach())

    def _note(self, grad_norm: torch.Tensor | None, found: torch.Tensor | None) -> None:
        if grad_norm is not None:
            self._grad_norm = grad_norm
        if found is not None:
            self._found = found if self._found is None else self._found + found.to(self._found.device)

    def _chosen(self, optimizer: int | torch.optim.Optimizer) -> torch.optim.Optimizer:
        own = self._optimization.optimizers
        for one in own:
            if one is optimizer:
                return one
        shown = optimizer if isinstance(optimizer, int) else f"a {type(optimizer).__name__}"
        raise ContractError(
            f"optimize() got optimizer={shown}, which get_optimizers_schedulers() did not return; give it"
            f" the index of one of the {len(own)}"
        )


def _check_closure(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor | None, closure: Callable[[], torch.Tensor] | None
) -> None:
    if (loss is None) == (closure is None):
        raise ContractError("optimize() takes a loss or a closure that computes it; give it one of them")
    if closure is not None and not callable(closure):
        raise ContractError(f"optimize() got closure={closure!r:.80}; give it a function that computes the loss")
    if closure is None and wants_closure(optimizer):
        raise ContractError(
            f"optimize() got a loss for {type(optimizer).__name__}, which computes the loss itself; give it"
            f" optimize(None, closure=...)"
        )


def _bad_loss(loss: object) -> ContractError:
    shown = f"{loss!r:.80}"
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        shown = f"a tensor of shape {tuple(loss.shape)}"
    return ContractError(
        f"optimize() got {shown}, which is not a loss; give it a real tensor of one element with a graph"
    )
