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
from trainer.callbacks.checks import Checks, is_finite
from trainer.errors import ContractError
from trainer.hooks.hooks import without_outputs
from trainer.module_interface import CallbackInterface, inline


class EMA(CallbackInterface):
    """Averages the weights over the steps: each step moves the average by ``1 - decay`` of the way to the weights::

        from trainer import Trainer, TrainerArguments
        from trainer.callbacks import EMA

        module = MyModule()
        ema = EMA(module, decay=0.999)
        trainer = Trainer(module, TrainerArguments(epochs=10), callbacks=[ema])
        trainer.train()
        with ema.applied():  # the module has the averaged weights, until the end of the block
            outputs = trainer.test()
        torch.save(ema.weights(), "averaged.pt")

    The average begins as the weights after the first step. It is computed on the loop's thread and on the weights'
    device, right after each optimizer step; a step that was skipped does not count. The weights are followed in place,
    so torch.compile changes nothing. It is part of checkpoints, to the last bit.

    Only parameters that are trained are averaged, and nothing else of the module is copied. One that is unfrozen later
    joins with the weights that it has at the beginning of the next epoch. Weights in half precision are averaged in
    float32: small moves would be lost.

    Validation uses the weights as they are trained.

    Args:
        module: The module that is trained, or a part of it.
        decay: How much of the average stays at each step, from 0 up to but not including 1.
        every_n_steps: Average when ``global_step`` is a multiple of this.
        buffers: Average floating-point buffers, too (such as a batch norm's running mean), and take the others as they
            are at the last averaged step. Otherwise `weights` and `applied` have the buffers of the module.

    Raises:
        ArgumentsError: one of them cannot be used.
        ContractError: in a run, if it trains nothing of this module.
        CheckpointMismatch: on resuming, if the average is that of another model; names what does not fit.
    """

    def __init__(
        self, module: nn.Module, decay: float = 0.999, *, every_n_steps: int = 1, buffers: bool = False
    ) -> None:
        checks = Checks("EMA")
        checks.that(isinstance(module, nn.Module), f"module must be an instance of a torch module, not {module!r:.80}")
        checks.that(
            is_finite(decay) and 0 <= decay < 1, f"decay must be a number from 0 to less than 1, not {decay!r:.80}"
        )
        checks.whole("every_n_steps", every_n_steps)
        checks.flag("buffers", buffers)
        checks.done()
        self.steps = 0
        """How many steps have been averaged."""
        self._module = module
        self._decay = float(decay)
        self._every_n_steps = every_n_steps
        self._buffers = buffers
        self._average: dict[str, torch.Tensor] = {}
        self._live: dict[str, torch.Tensor] = {}
        """The module's own tensors that are averaged, by the same names."""
        self._groups: list[tuple[bool, list[torch.Tensor], list[torch.Tensor]]] = []
        """What is moved at once: whether it is of one type, averages, the module's own."""
        self._taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Buffers that are no numbers to average."""
        self._move = get_ema_multi_avg_fn(self._decay)  # type: ignore[no-untyped-call]  # torch's
        self._is_applied = False

    # ------------------------------------------------------------------------------------ on the loop's thread

    def bind_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """The run's optimizers, from the loop, before its first step: they must train something of what is averaged."""
        trained = {
            id(tensor) for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]
        }
        own = {id(tensor) for tensor in self._module.parameters() if tensor.requires_grad}
        if own and trained and not own & trained:
            raise ContractError(
                f"EMA was given a {type(self._module).__name__} of which this run trains no parameter: give it the very"
                f" module that the Trainer gets, or a part of it"
            )

    @inline
    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """See whether the module has got other parameters to train."""
        if self._average:
            self._follow()

    @inline
    @without_outputs
    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """The weights have changed: move the average."""
        if global_step % self._every_n_steps:
            return
        if self._is_applied:
            raise StagecastError("EMA: the averaged weights are applied to the module, and it is trained meanwhile")
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
            else:  # the function above takes one type only
                torch._foreach_mul_(averages, self._decay)  # pyright: ignore[reportPrivateImportUsage]  # no public one
                torch._foreach_add_(averages, live, alpha=1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in self._taken:
            average.copy_(buffer)

    @torch.no_grad()
    def _follow(self, *, join: bool = True) -> None:
        """Follow the tensors that the module has now. ``join``: what it trains, and was not averaged yet, begins."""
        named, before = self._named(), self._average
        self._average, self._live = {}, {}
        for name, tensor in named.items():
            wanted = join and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)) and not is_lazy(tensor)
            if name in before:
                self._average[name], self._live[name] = before[name].to(tensor.device), tensor
            elif wanted:
                self._average[name], self._live[name] = tensor.detach().to(_wide(tensor.dtype), copy=True), tensor
        groups: dict[Any, tuple[bool, list[torch.Tensor], list[torch.Tensor]]] = {}
        self._taken = []
        for name, tensor in self._live.items():
            average = self._average[name]
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self._taken.append((average, tensor))
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
        """The module's state dict with the averaged weights, in the types of the module's: a copy, on its device.

        Call it on the loop's thread, in a fenced hook, or when nothing trains the module.

        Raises:
            StagecastError: no step was averaged so far.
        """
        self._must_have_some()
        average = {id(tensor): self._average[name] for name, tensor in self._live.items()}
        return {
            name: average.get(id(tensor), tensor).detach().to(tensor.device, tensor.dtype, copy=True)
            if isinstance(tensor, torch.Tensor)
            else tensor
            for name, tensor in self._module.state_dict(keep_vars=True).items()
        }

    def copy_to(self, module: nn.Module) -> None:
        """Give another module of the same kind the averaged weights. Threads and errors as `weights`.

        Raises:
            RuntimeError: names or shapes are not those of this module.
        """
        module.load_state_dict(self.weights())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module has the averaged weights, afterwards its own again, whatever happens.

        Enter and leave it on the loop's thread, in a fenced hook, or when nothing trains the module. It takes the
        memory of another copy of the weights.

        Raises:
            StagecastError: no step was averaged so far, or they are applied already.
        """
        self._must_have_some()
        if self._is_applied:
            raise StagecastError("EMA.applied() is within another: the module has the averaged weights already")
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

    def _must_have_some(self) -> None:
        if not self._average:
            raise StagecastError(
                "EMA has averaged no step so far: train first, or resume from a checkpoint that has one"
            )

    # ---------------------------------------------------------------------------------------------- in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: the averages themselves, not copied."""
        return {"steps": self.steps, "decay": self._decay, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        named, saved = self._named(), state["average"]
        problems = [f"there is no {name} here to average" for name in saved if name not in named]
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
        self._follow(join=False)  # what has been unfrozen since joined at the next epoch then, and does so again


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]  # no public one


def _misfit(average: Any, tensor: torch.Tensor) -> str | None:
    """Why an average is not one of this tensor; None if it is."""
    if not isinstance(average, torch.Tensor):
        return f"is a {type(average).__name__} there, not a tensor"
    if average.shape != tensor.shape:
        return f"has the shape {tuple(average.shape)} there and {tuple(tensor.shape)} here"
    if average.dtype != _wide(tensor.dtype) and not (average.is_floating_point() and tensor.is_floating_point()):
        return f"has the type {average.dtype} there and {tensor.dtype} here"
    return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to average in."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
