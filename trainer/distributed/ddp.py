"""torch's DistributedDataParallel around a module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.buffers import broadcast, followed_buffers
from trainer.distributed.options import Ddp
from trainer.distributed.strategy import Share
from trainer.distributed.weighing import Weighing, mean_of
from trainer.errors import ArgumentsError, add_note
from trainer.hooks.collate import as_tuple
from trainer.module_interface import ModuleInterface


class ManualDdp:
    """See `ManualStrategy`. The gradients of each update are averaged in one message after its backward pass."""

    always_together = False

    def __init__(self, module: ModuleInterface, options: Ddp) -> None:
        self.part = 1.0
        self._module = module
        self._weighing = Weighing()
        if options.sync_batch_norm:
            _convert_batch_norms(module)
        broadcast(module.parameters())
        self.sync_buffers()
        self._followed = followed_buffers(module)

    @contextlib.contextmanager
    def weigh(self, part: float) -> Iterator[None]:
        self.part = part
        broadcast(self._followed)  # WAIT: for rank 0, as in a pass of DistributedDataParallel
        if part != 1:
            self._weighing.add(self._module.parameters(), part)
        try:
            yield
        finally:
            self._weighing.clear()

    def average(self, parameters: list[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        weight, mean = self.mean(loss)
        # A parameter without a gradient on any rank must stay without one: weight decay would move it. The host must
        # know which these are, because all ranks send the same gradients.
        there = torch.tensor([one.grad is not None for one in parameters], dtype=torch.float32, device=loss.device)
        dist.all_reduce(there)
        used = [one for one, ranks in zip(parameters, there.tolist(), strict=True) if ranks]  # SYNC: see above
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for one in used:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
            groups.setdefault(one.dtype, []).append(one)
        for group in groups.values():
            gradients = [one.grad.to_dense().reshape(-1) for one in group if one.grad is not None]
            joined = torch.cat(gradients)
            dist.all_reduce(joined)
            joined /= weight * dist.get_world_size()
            for one, gradient in zip(group, torch.split(joined, [one.numel() for one in group]), strict=True):
                one.grad = gradient.view_as(one)
        return mean

    def mean(self, loss: torch.Tensor | None) -> Share:
        return mean_of(loss, self.part, next(self._module.parameters()).device)

    def sync_buffers(self) -> None:
        broadcast(self._module.buffers())

    def refresh(self) -> None:
        """Each update averages the gradients that there are."""


class DdpStrategy:
    """See `AutomaticStrategy`.

    A parameter of two numbers, whose gradient is averaged along with the module's, carries the weight and the loss of a
    step to all ranks, without a message of its own.
    """

    always_together = False

    def __init__(self, module: ModuleInterface, options: Ddp) -> None:
        self._module = module
        self._weighing = Weighing()
        self._options = options
        if options.sync_batch_norm:
            _convert_batch_norms(module)
        self._wrap()

    def _wrap(self) -> None:
        self._trained = [one for one in self._module.parameters() if one.requires_grad]
        if not self._trained:
            raise ArgumentsError(
                "strategy='ddp' needs a module with a parameter that requires a gradient; set strategy='single'"
            )
        options = self._options
        inner = _Measured(self._module, self._trained[0], searches=options.find_unused_parameters)
        self._tally, self._passing = inner.tally, inner.passing
        self._ddp = DistributedDataParallel(
            inner,
            # Without device_ids: the module moves its batches itself.
            find_unused_parameters=options.find_unused_parameters,
            bucket_cap_mb=options.bucket_cap_mb,
            gradient_as_bucket_view=True,
        )
        self._parts: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}  # gradients of the tally, and their losses

    def refresh(self) -> None:
        trained = [id(one) for one in self._module.parameters() if one.requires_grad]
        if trained != [id(one) for one in self._trained]:
            self._wrap()

    def forward(self, *args: Any) -> Any:
        passing = self._passing
        try:
            self._ddp(*args)
        except RuntimeError as error:
            if "finished reduction" in str(error):
                add_note(
                    error,
                    "stagecast: a step has left a parameter without a gradient; freeze it, or set"
                    " strategy=Ddp(find_unused_parameters=True)",
                )
            raise
        result, passing.result = passing.result, None
        return result

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        return self._ddp.no_sync()

    def expect(self, part: float, *, is_dummy: bool) -> None:
        self._passing.skips = not part and not is_dummy

    def backward(self, scaled: torch.Tensor | None, loss: torch.Tensor | None, part: float, *, last: bool) -> None:
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        if scaled is not None:
            roots.append(scaled)
            gradients.append(None)
        elif last and not self._options.find_unused_parameters:
            roots += self._trained
            gradients += [torch.zeros_like(one) for one in self._trained]
        if last or part:
            roots.append(self._tally)
            gradients.append(self._measure(loss, part))
        if scaled is not None and not part:  # of a dummy
            self._weighing.add(self._trained, 0.0)
        if roots:
            torch.autograd.backward(roots, gradients)
        self._weighing.clear()

    def _measure(self, loss: torch.Tensor | None, part: float) -> torch.Tensor:
        found = self._parts.get(part)
        if found is None:
            if len(self._parts) > 64:
                self._parts.clear()
            made = torch.full_like(self._tally, part, requires_grad=False)
            found = self._parts[part] = made, made[1]
        both, weighted = found  # written again for each batch: the backward pass copies what is held elsewhere, too
        if loss is None or not part:
            weighted.zero_()
        else:
            share = loss if part == 1 else loss * part
            weighted.copy_(share.reshape(()) if share.dim() else share)
        return both

    def total(self, check: Callable[[], torch.Tensor | None], *, is_whole: bool) -> tuple[Share, None]:
        gradient, self._tally.grad = self._tally.grad, None
        assert gradient is not None
        # On the CPU the gradients are complete, so that reading one waits for nothing.
        weight = gradient.tolist()[0] if gradient.is_cpu else torch.select_copy(gradient, 0, 0)
        return Share(weight, torch.select_copy(gradient, 0, 1)), None

    def settle(self) -> None:
        """The numbers have come with the gradients."""

    def sync_buffers(self) -> None:
        broadcast(self._module.buffers())


class _Passing:
    """What a forward pass leaves: not attributes of the module, which take several times as long to set.

    Attributes:
        result: What the module has returned.
        skips: The next pass is of a batch without weight.
    """

    def __init__(self) -> None:
        self.result: Any = None
        self.skips = False


class _Measured(nn.Module):
    """The module as DistributedDataParallel calls it.

    Attributes:
        tally: The gradient is the weight and the loss of a step. Its elements are never read.

    Args:
        searches: Whether DistributedDataParallel searches for unused parameters.
    """

    def __init__(self, module: nn.Module, like: torch.Tensor, *, searches: bool) -> None:
        super().__init__()
        self.module = module
        # Of the parameters' type, to share their messages; a count of rows needs more digits than bfloat16 has.
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        self.tally = nn.Parameter(torch.zeros(2, dtype=dtype, device=like.device))
        self.passing = _Passing()
        self._searches = searches

    def forward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Return what DistributedDataParallel must search for unused parameters."""
        passing = self.passing
        passing.result = result = self.module(*args)
        if not self._searches:
            return ()
        searched = self.tally.view(2)  # a view, because a parameter itself has no graph
        loss = None if result is None or passing.skips else next(iter(as_tuple(result)), None)
        return (loss, searched) if isinstance(loss, torch.Tensor) else (searched,)


def _convert_batch_norms(module: ModuleInterface) -> None:
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        raise ArgumentsError("Ddp(sync_batch_norm=True) needs an accelerator; set it to False on the CPU")
    for name, child in module.named_children():
        setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
