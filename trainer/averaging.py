"""Averaged weights: what the callbacks `EMA` and `SWA` have in common, and all their arithmetic."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from events.errors import CheckpointMismatch, StagecastError
from events.log import logger
from trainer.callback_interface import CallbackInterface, inline
from trainer.distributed.local import local, whole
from trainer.errors import ContractError, OptimizerError


class AveragedWeights(CallbackInterface, ABC):
    """Averages the trained parameters of a module; a subclass chooses when, and with which weight.

    Only trained parameters are averaged and copied. A parameter that is added or unfrozen later joins at the beginning
    of the next epoch, with a warning. Weights in half precision are averaged in float32, which would otherwise lose
    small updates. The average is on the device of the weights. All of it runs on the loop's thread.

    Args:
        module: The trained module, or a part of it.
        buffers: Average floating-point buffers, too, and copy the others.
        validate: Whether the run validates the averaged weights.
    """

    def __init__(self, module: nn.Module, *, buffers: bool, validate: bool) -> None:
        self.steps = 0
        """Number of times that the weights were averaged."""
        self.validate = validate
        """Whether the run validates the averaged weights."""
        self.is_applied = False
        """Whether the module has the averaged weights at present."""
        self._module = module
        self._buffers = buffers
        self._average: dict[str, torch.Tensor] = {}
        self._live: dict[str, torch.Tensor] = {}
        """The module's averaged tensors, by the same names."""
        self._groups: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        """Tensors that are updated in one call: averages, the module's."""
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Buffers that are copied, not averaged: copies, the module's."""
        self._own: list[torch.Tensor] = []
        """The module's own tensors while the averages are applied."""

    @property
    def name(self) -> str:
        """The class, for messages."""
        return type(self).__name__

    # ------------------------------------------------------------------------------------ on the loop's thread

    def bind_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Check that the run's optimizers train the module; the loop calls it before the first step.

        Raises:
            ContractError: They train no parameter of it.
            OptimizerError: One replaces the weights for the validation itself, as schedule-free optimizers do.
        """
        trained = {
            id(tensor) for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]
        }
        own = {id(tensor) for tensor in self._module.parameters() if tensor.requires_grad}
        if own and trained and not own & trained:
            raise ContractError(
                f"{self.name} has a {type(self._module).__name__} of which this run trains no parameter; give it the"
                f" module of the Trainer, or a part of it"
            )
        for optimizer in optimizers:
            if self.validate and all(callable(getattr(optimizer, method, None)) for method in ("eval", "train")):
                raise OptimizerError(
                    f"{type(optimizer).__name__} averages the weights itself and validates its average, so that"
                    f" {self.name}(validate=True) cannot; remove {self.name}"
                )

    def bind_schedules(self, replace: Callable[[list[Any], bool], None]) -> None:
        """Receive ``replace(schedulers, per_step)``, which replaces the run's schedulers, before the first step."""

    @inline
    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Follow parameters that were added, unfrozen or replaced since the last epoch."""
        if self._average:
            self._follow()

    def end_epoch(self, global_step: int) -> None:
        """An epoch has had its last step, and its validation comes next; may be called several times."""

    def add(self) -> None:
        """Average the current weights.

        Raises:
            StagecastError: The averaged weights are applied, so a step has trained them.
        """
        if self.is_applied:
            raise StagecastError(
                f"{self.name}: a step was trained inside the block of applied(); leave the block first"
            )
        if not self._average:
            self._follow()
        else:
            self._average_once(self.weight_of_next())
        self.steps += 1

    @abstractmethod
    def weight_of_next(self) -> float:
        """The weight that the current weights have in the average of them and the earlier ones, in (0, 1]."""

    @torch.no_grad()
    def _average_once(self, weight: float) -> None:
        for averages, live in self._groups:
            if averages[0].dtype == live[0].dtype:
                torch._foreach_lerp_(averages, live, weight)  # pyright: ignore[reportPrivateImportUsage]  # no public one
            else:  # lerp requires one type
                torch._foreach_mul_(averages, 1 - weight)  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_add_(averages, live, alpha=weight)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in self._copied:
            average.copy_(buffer)

    @torch.no_grad()
    def _follow(self, *, join: bool = True) -> None:
        """Follow the module's current tensors. ``join``: also average trained tensors that were not averaged yet."""
        named, before = self._named(), self._average
        self._average, self._live = {}, {}
        late: list[str] = []
        for name, tensor in named.items():
            wanted = join and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)) and not is_lazy(tensor)
            if name in before and before[name].shape == tensor.shape:
                self._average[name], self._live[name] = before[name].to(tensor.device), tensor
            elif wanted:
                self._average[name], self._live[name] = tensor.detach().to(_wide(tensor.dtype), copy=True), tensor
                late.append(name)
        if before and late:
            logger.warning(f"{self.name} averages {_first(late)} only from here on, added or unfrozen since it began")
        if gone := [name for name in before if name not in self._average]:
            logger.warning(f"{self.name} drops the average of {_first(gone)}, which the module does not have any more")
        self._group()

    def _group(self) -> None:
        groups: dict[object, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        recomputed = {id(buffer) for norm in self.norms for buffer in norm.buffers(recurse=False)}
        self._copied = []
        for name, tensor in self._live.items():
            average = self._average[name]
            if id(tensor) in recomputed:
                continue
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self._copied.append((local(average), local(tensor)))
                continue
            averages, live = groups.setdefault((tensor.device, tensor.dtype, average.dtype), ([], []))
            averages.append(local(average))
            live.append(local(tensor))
        self._groups = list(groups.values())

    def _named(self) -> dict[str, torch.Tensor]:
        named: dict[str, torch.Tensor] = dict(self._module.named_parameters())
        buffers = dict(self._module.named_buffers())
        if not self._buffers:
            recomputed = {id(buffer) for norm in self.norms for buffer in norm.buffers(recurse=False)}
            buffers = {name: buffer for name, buffer in buffers.items() if id(buffer) in recomputed}
        return named | buffers

    # -------------------------------------------------------------------------------------- batch norm statistics

    @property
    def norms(self) -> list[_BatchNorm]:
        """The batch norms whose statistics are computed anew for the averaged weights."""
        return []

    @property
    def is_stale(self) -> bool:
        """Whether the statistics of `norms` are those of an earlier average."""
        return False

    def recompute(self, batches: Iterable[Any], run: Callable[[Any], object]) -> None:
        """Compute the statistics of `norms` in the block of `applied`.

        Args:
            run: Runs the module on a batch.
        """

    # ---------------------------------------------------------------------------------------- the averaged weights

    def averages(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each averaged tensor of the module, and its average: not copied, in float32 for half precision."""
        return ((tensor, self._average[name]) for name, tensor in self._live.items())

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """The module's state dict with the averaged weights, in the module's types: a copy, on its device.

        Call it on the loop's thread, in a fenced hook, or outside of a run.

        Raises:
            StagecastError: No step was averaged.
        """
        self._check_has_steps()
        self._warn_if_stale()
        average = {id(tensor): average for tensor, average in self.averages()}
        return {
            name: average.get(id(tensor), tensor).detach().to(tensor.device, tensor.dtype, copy=True)
            if isinstance(tensor, torch.Tensor)
            else tensor
            for name, tensor in self._module.state_dict(keep_vars=True).items()
        }

    def copy_to(self, module: nn.Module) -> None:
        """Load the averaged weights into another module of the same kind. Threads and errors as `weights`.

        Weights that are divided among ranks are gathered: WAIT: for all ranks, each of which must call it.

        Raises:
            RuntimeError: The other module has other names or shapes.
        """
        module.load_state_dict({name: whole(value) for name, value in self.weights().items()})

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights within the block, and restore its own afterwards.

        Enter and leave it on the loop's thread, in a fenced hook, or outside of a run. It needs the memory of another
        copy of the weights.

        Raises:
            StagecastError: No step was averaged, or the average is applied already, as in a validation of it.
        """
        self.apply()
        self._warn_if_stale()
        try:
            yield
        finally:
            self.restore()

    def apply(self) -> None:
        """Begin the block of `applied`."""
        self._check_has_steps()
        if self.is_applied:
            raise StagecastError(
                f"{self.name}.applied() is nested, so the average is applied already; leave the outer block"
            )
        live = list(self._live.values())
        with torch.no_grad():
            self._own = [tensor.detach().clone() for tensor in live]
        self.is_applied = True
        try:
            _copy(live, list(self._average.values()))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """End the block of `applied`."""
        _copy(list(self._live.values()), self._own)
        self.is_applied, self._own = False, []

    def _check_has_steps(self) -> None:
        if not self._average:
            raise StagecastError(
                f"{self.name} has not averaged any step; train first, or resume from a checkpoint with an {self.name}"
            )

    def _warn_if_stale(self) -> None:
        if self.is_stale:
            logger.warning(
                f"the batch norm statistics of {self.name} are those of an earlier average, because the run stopped"
                f" before it computed them"
            )

    # ---------------------------------------------------------------------------------------------- in checkpoints

    def state_dict(self) -> dict[str, object]:
        """The state for a checkpoint; the averages are not copied."""
        return {"steps": self.steps, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            CheckpointMismatch: It is that of another model; names the mismatches.
        """
        named, saved = self._named(), state["average"]
        problems = [f"{name} does not exist here" for name in saved if name not in named]
        problems += [
            f"{name} {problem}"
            for name, tensor in named.items()
            if name in saved and (problem := _misfit(saved[name], tensor)) is not None
        ]
        if not self._is_sound(state):
            problems.append("its number of steps or its decay is not a number")
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointMismatch(f"the checkpoint's {self.name} does not fit: {'; '.join(problems[:8])}{more}")
        self.steps = state["steps"]
        self._average = dict(saved)
        self._follow(join=False)  # tensors that were unfrozen since join at the next epoch, as without the interruption

    def _is_sound(self, state: dict[str, Any]) -> bool:
        """Whether the numbers of a saved state have their types."""
        return type(state["steps"]) is int and state["steps"] >= 0


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    # Of tensors that are divided among ranks, each rank copies its part: torch's `_foreach_copy_` takes no others.
    torch._foreach_copy_(list(map(local, targets)), list(map(local, sources)))  # pyright: ignore[reportPrivateImportUsage]  # no public one


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


def _first(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
