"""The gradients of a step: whether all are finite, their norm, clipping, and clearing. Nothing waits for the device.

With gradients that are divided among ranks, checks and norms are of all parts. WAIT: for all ranks, once per step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from trainer.distributed.local import add_up, is_split, local, whole

_PART_BYTES = 4 * 2**20
"""Gradients of a step that are checked on a CPU, where they may be checked in turn."""

_LARGE = 2**25
"""Bytes of a model on a CPU from which the memory of its gradients is kept until the next backward pass."""


class GradientCheck:
    """Looks for NaN and infinity in the gradients of each step, of any device, layout and type.

    Used on the loop's thread, in every step. It waits for no device.

    Args:
        in_turn: Check about 4 MiB of a CPU's gradients per step, the others in the next steps: to read all of them
            takes a large model 4 to 7 % of its step. A gradient that is not finite has made its parameter so, and is
            found later, unless that has made the loss so before.
        shards: The gradients are divided among ranks.
    """

    def __init__(self, *, in_turn: bool = False, shards: bool = False) -> None:
        self._in_turn = in_turn
        self._shards = shards
        self._turns: dict[int, Iterator[slice]] = {}  # by number of gradients: a part of the model has its own
        self._one = torch.ones(())
        self._free: list[torch.Tensor] = []  # zeros () on one device, allocated in batches to save a kernel per step

    def find(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        """Check the gradients of a step, as `find_here`. WAIT: for all ranks, if they are divided among them."""
        split = next(filter(is_split, gradients), None) if self._shards else None
        found = self.find_here(gradients)
        return found if split is None or found is None else add_up(found, split)

    def find_here(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        """Check the gradients of a step, or this rank's parts of them.

        Returns:
            A float32 scalar ``()`` on a device of the gradients, positive if any element is not finite. None without
            gradients.
        """
        if not gradients:
            return None
        if self._in_turn:
            turns = self._turns.get(len(gradients))
            if turns is None:
                turns = self._turns[len(gradients)] = itertools.cycle(_parts(gradients))
            gradients = gradients[next(turns)]
        if self._shards:
            with torch.no_grad():
                gradients = [local(one) for one in gradients]
        if not self._free:
            device = gradients[0].device
            self._free = list(torch.zeros(256, device=device).unbind())
            self._one = torch.ones((), device=device)
        found = self._free.pop()
        try:
            # One kernel for all of them, the one of torch's GradScaler; measured 7 us where a norm takes 24 us.
            torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore[reportPrivateImportUsage]  # no public one
                gradients, found, self._one
            )
        except RuntimeError:  # sparse or complex gradients, several devices or types, or another device than before
            if found.device != gradients[0].device:
                self._free.clear()
            found = _look_at_each(gradients)
        return found


def _parts(gradients: list[torch.Tensor]) -> list[slice]:
    """Divide gradients into parts of `_PART_BYTES`, or of one larger gradient; those of other devices are one part."""
    begins, nbytes = [0], 0
    for index, one in enumerate(gradients):
        size = one.numel() * one.element_size()
        if nbytes and nbytes + size > _PART_BYTES and one.is_cpu:
            begins.append(index)
            nbytes = 0
        nbytes += size
    return [slice(begin, end) for begin, end in itertools.pairwise([*begins, len(gradients)])]


def _look_at_each(gradients: list[torch.Tensor]) -> torch.Tensor:
    each = [(~torch.isfinite(_dense(one)).all()).float() for one in gradients]
    devices = [one.device for one in each]
    # Not to the CPU if another device is present: an asynchronous copy to the CPU is not complete yet.
    device = next((one for one in devices if one.type != "cpu"), devices[0])
    return torch.stack([one.to(device, non_blocking=True) for one in each]).sum()


class Clearing:
    """Clears the gradients of all optimizers, and those of parameters that no optimizer holds. On the loop's thread."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._optimizers = optimizers
        # torch's own `zero_grad` also opens a range for the profiler, which costs more than the loop adds to a step.
        self._clear_themselves = [one for one in optimizers if not _has_stock_zero_grad(one)]
        self._cleared_here = [one for one in optimizers if _has_stock_zero_grad(one)]
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            _keep_freed_memory()
        self._keeps_memory = False
        self._old: list[torch.Tensor | None] = []
        self._strays: list[nn.Parameter] = []
        self._held = 0
        self._has_new_parameters = False
        self._handles = [
            register_module_parameter_registration_hook(self._note_registration),
            register_module_module_registration_hook(self._note_registration),
        ]
        self.find_strays()

    def find_strays(self) -> None:
        """Find the parameters that no optimizer holds at present, frozen ones included, and clear their gradients.

        Otherwise these would add up until an optimizer gets the parameter. `clear` calls it after a parameter was
        registered in any module, or the optimizers hold another number of parameters.
        """
        self._has_new_parameters = False
        held = [p for o in self._optimizers for g in o.param_groups for p in g["params"]]
        self._held = len(held)
        self._keeps_memory = self._on_cpu and sum(p.nbytes for p in held) > _LARGE
        known = set(map(id, held))
        self._strays = [p for p in self._module.parameters() if id(p) not in known]
        for parameter in self._strays:
            parameter.grad = None

    def _note_registration(self, *_: object) -> None:
        self._has_new_parameters = True

    def clear(self) -> None:
        """Set all gradients to None; on a CPU, the memory of a large model's is kept until `release`."""
        if self._old:
            self.release()
        held = 0
        for optimizer in self._clear_themselves:
            optimizer.zero_grad()
            held += sum(len(group["params"]) for group in optimizer.param_groups)
        for optimizer in self._cleared_here:
            for group in optimizer.param_groups:
                parameters = group["params"]
                held += len(parameters)
                if self._keeps_memory:
                    self._old += [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    parameter.grad = None
        if held != self._held or self._has_new_parameters:
            self.find_strays()
        for parameter in self._strays:
            parameter.grad = None

    def release(self) -> None:
        """Free the memory of the gradients that were cleared, right before a backward pass allocates it again.

        If it were freed after the step, the C library would return much of it to the system, in spite of
        `_keep_freed_memory`: measured 19,000 page faults in a step with 100 MB of gradients, a fifth of the step.
        """
        self._old.clear()

    def close(self) -> None:
        """Clear the gradients at the end of the run."""
        self.clear()
        self.release()
        for handle in self._handles:
            handle.remove()


def _keep_freed_memory() -> None:
    """Have the C library keep up to 64 MiB of freed memory on top of its heap, instead of returning it to the system.

    glibc returns what exceeds twice the largest block that the process has freed, of those up to 32 MiB
    (`M_MMAP_THRESHOLD` in mallopt(3)), so one such block is freed here; it is never touched. Otherwise it depends on
    chance how many pages a step gets anew: between 200 and 3,800 with 17 MB of gradients, up to a quarter of the step.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def _has_stock_zero_grad(optimizer: torch.optim.Optimizer) -> bool:
    """Whether clearing gradients is torch's own: neither its class nor anybody since has made it do more."""
    return type(optimizer).zero_grad is torch.optim.Optimizer.zero_grad and "zero_grad" not in vars(optimizer)


def clip_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients in place so that their total norm is at most ``max_norm``; infinity only measures it.

    A sparse gradient is coalesced, and its norm is that of its values.

    Returns:
        The norm before, a scalar ``()``.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    try:
        norm = whole(get_total_norm([one.grad for one in parameters if one.grad is not None]))
        if not math.isinf(max_norm):
            clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
    except NotImplementedError:  # raised for a sparse gradient, before any is changed
        values = [_coalesced_values(parameter) for parameter in parameters]
    norm = get_total_norm(values)
    if not math.isinf(max_norm):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for one in values:
            one.mul_(factor.to(one.device, non_blocking=True))
    return norm


def _coalesced_values(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is torch.strided:
        return gradient
    if gradient.layout is torch.sparse_coo:
        parameter.grad = gradient = gradient.coalesce()
        return gradient._values()
    return gradient.values()


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is torch.strided:
        return gradient
    return gradient.coalesce()._values() if gradient.layout is torch.sparse_coo else gradient.values()
