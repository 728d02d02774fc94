"""The gradients of a step: whether all are finite, their norm, and clipping. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm


class GradientCheck:
    """Looks for NaN and infinity in the gradients of each step, of any device, layout and type.

    Used on the loop's thread, in every step. It waits for no device.
    """

    def __init__(self) -> None:
        self._one = torch.ones(())
        self._free: list[torch.Tensor] = []  # zeros () on one device, allocated in batches to save a kernel per step

    def find(self, gradients: list[torch.Tensor]) -> torch.Tensor | None:
        """Check the gradients of a step.

        Returns:
            A float32 scalar ``()`` on a device of the gradients, positive if any element is not finite. None if there
            are no gradients.
        """
        if not gradients:
            return None
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


def _look_at_each(gradients: list[torch.Tensor]) -> torch.Tensor:
    each = [(~torch.isfinite(_dense(one)).all()).float() for one in gradients]
    devices = [one.device for one in each]
    # Not to the CPU if another device is present: an asynchronous copy to the CPU is not complete yet.
    device = next((one for one in devices if one.type != "cpu"), devices[0])
    return torch.stack([one.to(device, non_blocking=True) for one in each]).sum()


def clip_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients in place so that their total norm is at most ``max_norm``; infinity only measures it.

    A sparse gradient is coalesced, and its norm is that of its values.

    Returns:
        The norm before, a scalar ``()``.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    try:
        if math.isinf(max_norm):
            return get_total_norm([one.grad for one in parameters if one.grad is not None])
        return clip_grad_norm_(parameters, max_norm)
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
