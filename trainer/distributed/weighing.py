"""What the batch of each rank counts in the gradients and the loss of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from trainer.distributed.strategy import Share


class Weighing:
    """Multiplies what backward passes add to gradients, until `clear`; by 0 even what is not finite.

    It does not change what ``torch.autograd.grad`` returns. On the loop's thread.
    """

    def __init__(self) -> None:
        self._held: dict[torch.Tensor, tuple[Any, Any]] = {}  # the node, which its parameter does not keep; its hook

    def add(self, parameters: Iterable[torch.Tensor], part: float) -> None:
        """Weigh the gradients of parameters that have no weight yet."""

        def weigh(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(one * part if part else torch.zeros_like(one) for one in gradients)

        for one in parameters:
            if one.requires_grad and one not in self._held:
                node: Any = get_gradient_edge(one).node
                self._held[one] = node, node.register_prehook(weigh)

    def clear(self) -> None:
        """End it for all parameters."""
        for _, hook in self._held.values():
            hook.remove()
        self._held.clear()


def mean_of(loss: torch.Tensor | None, part: float, device: torch.device) -> Share:
    """See `ManualStrategy.mean`."""
    both = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    if loss is not None and part:
        both[0], both[1] = part, loss.reshape(()) * part
    dist.all_reduce(both)
    weight, total = both.unbind()
    mean = total / weight
    return Share(weight / dist.get_world_size(), mean if loss is None else mean.to(loss.dtype))
