"""The gradients of a step: whether all are finite, their norm, and clipping. Nothing here waits for the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm


def non_finite(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Look for NaN and infinity in gradients of any device, layout and type.

    Returns:
        A float32 scalar ``()``, positive if any element is not finite, on a device of the gradients.
    """
    if not gradients:
        return torch.zeros(())
    found = torch.zeros((), device=gradients[0].device)
    try:
        # One kernel for all of them, the one of torch's GradScaler; measured 4 us where a norm takes 11 us.
        torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore[reportPrivateImportUsage]  # no public one
            gradients, found, _one(found.device)
        )
    except RuntimeError:  # sparse or complex gradients, several devices or types
        each = [(~torch.isfinite(_dense(one)).all()).float() for one in gradients]
        devices = [one.device for one in each]
        # Not to the CPU where another is: a copy from a device that nobody waits for is not there yet.
        device = next((one for one in devices if one.type != "cpu"), devices[0])
        found = torch.stack([one.to(device, non_blocking=True) for one in each]).sum()
    return found


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


@functools.cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)
