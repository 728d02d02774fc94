"""Keep an exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from events.errors import CheckpointMismatch, StagecastError
from events.log import logger
from trainer.callback_interface import CallbackInterface, inline
from trainer.callbacks.checks import Checks, is_finite
from trainer.errors import ContractError
from trainer.hooks.hooks import without_outputs


class EMA(CallbackInterface):
    """Keeps an exponential moving average of the weights, ``decay * average + (1 - decay) * weights`` at each step::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import EMA

        module = MyModule()
        ema = EMA(module, decay=0.999)
        trainer = Trainer(module, TrainerArguments(epochs=10), callbacks=[ema])
        trainer.train()
        with ema.applied():  # the module has the averaged weights, until the end of the block
            outputs = trainer.test()
        torch.save(ema.weights(), "averaged.pt")

    The average starts with the weights after the first step. It is computed on the loop's thread and on the weights'
    device, right after each optimizer step that is not skipped. The weights are read in place, also under
    torch.compile. Checkpoints contain the average, bit for bit.

    Only trained parameters are averaged and copied. A parameter that is unfrozen later joins at the beginning of the
    next epoch. Weights in half precision are averaged in float32, which would otherwise lose small updates.

    Validation uses the trained weights, not the average.

    Args:
        module: The trained module, or a part of it.
        decay: The weight of the average at each step, in [0, 1).
        every_n_steps: Average when ``global_step`` is a multiple of this.
        buffers: Average floating-point buffers, too (such as a batch norm's running mean), and copy the others at each
            averaged step. Otherwise `weights` and `applied` have the buffers of the module.

    Raises:
        ArgumentsError: An argument is invalid.
        ContractError: In a run that trains no parameter of this module.
        CheckpointMismatch: On resuming with the average of another model; names the mismatches.
    """

    def __init__(
        self, module: nn.Module, decay: float = 0.999, *, every_n_steps: int = 1, buffers: bool = False
    ) -> None:
        checks = Checks("EMA")
        checks.that(isinstance(module, nn.Module), f"module must be an instance of a torch module, not {module!r:.80}")
        checks.that(
            is_finite(decay) and 0 <= decay < 1, f"decay must be a number from 0 to less than 1, not {decay!r:.80}"
        )
        checks.count("every_n_steps", every_n_steps)
        checks.flag("buffers", buffers)
        checks.done()
        self.steps = 0
        """Number of averaged steps."""
        self._module = module
        self._decay = float(decay)
        self._every_n_steps = every_n_steps
        self._buffers = buffers
        self._average: dict[str, torch.Tensor] = {}
        self._live: dict[str, torch.Tensor] = {}
        """The module's averaged tensors, by the same names."""
        self._groups: list[tuple[bool, list[torch.Tensor], list[torch.Tensor]]] = []
        """Tensors that are updated in one call: whether both have one type, averages, the module's."""
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Buffers that are copied, not averaged: copies, the module's."""
        self._move = get_ema_multi_avg_fn(self._decay)  # type: ignore[no-untyped-call]  # torch's
        self._is_applied = False

    # ------------------------------------------------------------------------------------ on the loop's thread

    def bind_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Check that the run's optimizers train the module; the loop calls it before the first step."""
        trained = {
            id(tensor) for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]
        }
        own = {id(tensor) for tensor in self._module.parameters() if tensor.requires_grad}
        if own and trained and not own & trained:
            raise ContractError(
                f"EMA has a {type(self._module).__name__} of which this run trains no parameter; give it the module of"
                f" the Trainer, or a part of it"
            )

    @inline
    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Follow parameters that were unfrozen or replaced since the last epoch."""
        if self._average:
            self._follow()

    @inline
    @without_outputs
    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: object) -> None:
        """Update the average."""
        if global_step % self._every_n_steps:
            return
        if self._is_applied:
            raise StagecastError("EMA: a step was trained inside the block of applied(); leave the block first")
        if not self._average:
            self._follow()
        else:
            self._average_once()
        self.steps += 1

    @torch.no_grad()
    def _average_once(self) -> None:
        for alike, averages, live in self._groups:
            if alike:
                self._move(averages, live, self.steps)
            else:  # `_move` requires one type
                torch._foreach_mul_(averages, self._decay)  # pyright: ignore[reportPrivateImportUsage]  # no public one
                torch._foreach_add_(averages, live, alpha=1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in self._copied:
            average.copy_(buffer)

    @torch.no_grad()
    def _follow(self, *, join: bool = True) -> None:
        """Follow the module's current tensors. ``join``: also average trained tensors that were not averaged yet."""
        named, before = self._named(), self._average
        self._average, self._live = {}, {}
        for name, tensor in named.items():
            wanted = join and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)) and not is_lazy(tensor)
            if name in before:
                self._average[name], self._live[name] = before[name].to(tensor.device), tensor
            elif wanted:
                self._average[name], self._live[name] = tensor.detach().to(_wide(tensor.dtype), copy=True), tensor
        groups: dict[object, tuple[bool, list[torch.Tensor], list[torch.Tensor]]] = {}
        self._copied = []
        for name, tensor in self._live.items():
            average = self._average[name]
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self._copied.append((average, tensor))
                continue
            alike = average.dtype == tensor.dtype
            _, averages, live = groups.setdefault((tensor.device, tensor.dtype), (alike, [], []))
            averages.append(average)
            live.append(tensor)
        self._groups = list(groups.values())

    def _named(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = dict(self._module.named_parameters())
        return named | dict(self._module.named_buffers()) if self._buffers else named

    # ---------------------------------------------------------------------------------------- the averaged weights

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """The module's state dict with the averaged weights, in the module's types: a copy, on its device.

        Call it on the loop's thread, in a fenced hook, or outside of a run.

        Raises:
            StagecastError: No step was averaged.
        """
        self._check_has_steps()
        average = {id(tensor): self._average[name] for name, tensor in self._live.items()}
        return {
            name: average.get(id(tensor), tensor).detach().to(tensor.device, tensor.dtype, copy=True)
            if isinstance(tensor, torch.Tensor)
            else tensor
            for name, tensor in self._module.state_dict(keep_vars=True).items()
        }

    def copy_to(self, module: nn.Module) -> None:
        """Load the averaged weights into another module of the same kind. Threads and errors as `weights`.

        Raises:
            RuntimeError: The other module has other names or shapes.
        """
        module.load_state_dict(self.weights())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights within the block, and restore its own afterwards.

        Enter and leave it on the loop's thread, in a fenced hook, or outside of a run. It needs the memory of another
        copy of the weights.

        Raises:
            StagecastError: No step was averaged, or the average is applied already.
        """
        self._check_has_steps()
        if self._is_applied:
            raise StagecastError("EMA.applied() is nested, so the average is applied already; leave the outer block")
        live = list(self._live.values())
        with torch.no_grad():
            own = [tensor.detach().clone() for tensor in live]
        self._is_applied = True
        try:
            _copy(live, list(self._average.values()))
            yield
        finally:
            _copy(live, own)
            self._is_applied = False

    def _check_has_steps(self) -> None:
        if not self._average:
            raise StagecastError("EMA has not averaged any step; train first, or resume from a checkpoint with an EMA")

    # ---------------------------------------------------------------------------------------------- in checkpoints

    def state_dict(self) -> dict[str, object]:
        """The state for a checkpoint; the averages are not copied."""
        return {"steps": self.steps, "decay": self._decay, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        named, saved = self._named(), state["average"]
        problems = [f"{name} does not exist here" for name in saved if name not in named]
        problems += [
            f"{name} {problem}"
            for name, tensor in named.items()
            if name in saved and (problem := _misfit(saved[name], tensor)) is not None
        ]
        if type(state["steps"]) is not int or type(state["decay"]) is not float or state["steps"] < 0:
            problems.append("its number of steps or its decay is not a number")
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointMismatch(f"the checkpoint's EMA does not fit: {'; '.join(problems[:8])}{more}")
        if state["decay"] != self._decay:
            logger.warning(
                f"EMA(decay={self._decay:g}) continues an average that was taken with decay={state['decay']:g};"
                f" build it with that decay to resume exactly"
            )
        self.steps = state["steps"]
        self._average = dict(saved)
        self._follow(join=False)  # tensors that were unfrozen since join at the next epoch, as without the interruption


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]  # no public one


def _misfit(average: object, tensor: torch.Tensor) -> str | None:
    """Describe why an average does not belong to this tensor; None if it does."""
    if not isinstance(average, torch.Tensor):
        return f"is a {type(average).__name__} there, not a tensor"
    if average.shape != tensor.shape:
        return f"has the shape {tuple(average.shape)} there and {tuple(tensor.shape)} here"
    if average.dtype != _wide(tensor.dtype) and not (average.is_floating_point() and tensor.is_floating_point()):
        return f"has the type {average.dtype} there and {tensor.dtype} here"
    return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor's average."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
