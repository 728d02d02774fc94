"""How a step of the loop uses the model: alone, or together with the other ranks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from trainer.arguments import TrainerArguments
from trainer.distributed.options import Fsdp
from trainer.distributed.world import World
from trainer.module_interface import ModuleInterface


class Share(NamedTuple):
    """What the micro-batches of a step add up to, over all ranks."""

    weight: float | torch.Tensor
    """Their parts of the step: 1 if all of its weight was known, and has a loss. A tensor on a device."""
    loss: torch.Tensor
    """The sum of their losses by their parts, a scalar ``()`` on the device."""


class Strategy(Protocol):
    """What the ranks do together. On the loop's thread.

    Attributes:
        always_together: Whether each forward and backward pass is one of all ranks, also of batches without weight and
            in evaluation.
    """

    always_together: bool

    def sync_buffers(self) -> None:
        """Copy the buffers of rank 0, such as running statistics, to all ranks. WAIT: for all ranks."""

    def refresh(self) -> None:
        """Start over if other parameters are trained than before."""


class AutomaticStrategy(Strategy, Protocol):
    """The passes of a module whose gradients the trainer computes."""

    def forward(self, *args: Any) -> Any:
        """Call the module in the training stage."""

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """Keep the gradients of the passes in this block to this rank, until those of the next one."""
        ...

    def expect(self, part: float, *, is_dummy: bool) -> None:
        """Declare the batch of the next forward pass.

        Args:
            part: Its part of the mean over the ranks. At 0 its gradients are 0, even where its loss is not finite.
            is_dummy: It is computed only to have as many passes on each rank. Another batch of part 0 has no backward
                pass, unless `always_together`.
        """

    def backward(self, scaled: torch.Tensor | None, loss: torch.Tensor | None, part: float, *, last: bool) -> None:
        """Compute the gradients of a micro-batch.

        Args:
            scaled: Its share of the loss, perhaps scaled for float16; None: it has no gradients.
            loss: Its loss, detached; None without one.
            part: Its part of the mean over the ranks.
            last: It is the last of its step: the gradients become means over all ranks. WAIT: for all ranks.
        """

    def total(self, check: Callable[[], torch.Tensor | None], *, is_whole: bool) -> tuple[Share, torch.Tensor | None]:
        """Return what the micro-batches since the last call add up to, and what `check` has found on all ranks.

        WAIT: for all ranks, unless it is whole.

        Args:
            check: Looks for gradients that are not finite in this rank's part of them: `Optimization.check`. Not called
                if each rank has all gradients.
            is_whole: If every batch has a loss, its weight is 1, and no tensor of it is read before `settle`.
        """
        ...

    def settle(self) -> None:
        """Complete the tensors of the last `total`. WAIT: for all ranks, which have called that."""
        ...


class ManualStrategy(Strategy, Protocol):
    """The passes of a module that computes its gradients itself, in its forward pass.

    Attributes:
        part: Of the last batch in the mean over the ranks.
    """

    part: float

    def weigh(self, part: float) -> contextlib.AbstractContextManager[object]:
        """Run the passes of a batch in this block: what they add to gradients is multiplied by its part.

        At 0 it is 0, even where it is not finite. WAIT: for rank 0, if the module has buffers that training reads.
        """
        ...

    def average(self, parameters: list[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Make gradients means over all ranks; return the mean of the losses. WAIT: for all ranks."""
        ...

    def mean(self, loss: torch.Tensor | None) -> Share:
        """Return the sum of the parts of the ranks with a loss, and the mean of these. WAIT: for all ranks."""
        ...


def prepare(
    module: ModuleInterface, world: World, arguments: TrainerArguments, device: torch.device, *, loads: bool
) -> AutomaticStrategy | ManualStrategy | None:
    """Wrap a module for the ranks of a run; afterwards all of them have rank 0's weights. None in a single process.

    WAIT: for all ranks.

    Args:
        loads: Whether all entries of its state dict are read next, so that no initial value counts.

    Raises:
        ArgumentsError: The options do not fit the module or its device.
    """
    options = world.strategy
    if options is None:
        return None
    made: AutomaticStrategy | ManualStrategy
    if isinstance(options, Fsdp):
        fsdp: Any = importlib.import_module("trainer.distributed.fsdp")
        made = (fsdp.ManualFsdp if module.manual_optimization else fsdp.FsdpStrategy)(
            module, options, world, arguments, device, loads=loads
        )
    else:
        ddp: Any = importlib.import_module("trainer.distributed.ddp")
        made = (ddp.ManualDdp if module.manual_optimization else ddp.DdpStrategy)(module, options)
    return made
