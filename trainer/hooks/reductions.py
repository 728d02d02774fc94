"""Reduce the values of one name to one number, on their device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trainer.callback_interface import Reduction

Value = float | torch.Tensor
Numbers = list[tuple[Value, float]]
"""Values of one name, with their weights."""


def reduced(groups: dict[str, Numbers], reductions: dict[str, Reduction]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, group in groups.items():
        one = group[0][0] if len(group) == 1 else _REDUCE[reductions[name]](group)
        if one is not None:
            found[name] = one
    return found


def weighted_mean(group: Numbers) -> Value | None:
    """The mean of numbers and 0-dim tensors; on the tensors' device if there is any, without waiting for it.

    Values of weight 0 are skipped, even NaN. None if all weights are 0.
    """
    group = _counted(group)
    total = sum(weight for _, weight in group)
    if not total:
        return None
    stacked = one_tensor(group)
    if stacked is None:
        return sum(float(value) * weight for value, weight in group) / total
    weights = torch.tensor([weight for _, weight in group], dtype=stacked.dtype).to(stacked.device, non_blocking=True)
    return (stacked * weights).sum() / total


def _sum(group: Numbers) -> Value | None:
    if not (group := _counted(group)):
        return None
    stacked = one_tensor(group)
    return stacked.sum() if stacked is not None else math.fsum(float(value) for value, _ in group)


def _max(group: Numbers) -> Value | None:
    """NaN if a value is NaN, as torch's."""
    if not (group := _counted(group)):
        return None
    stacked = one_tensor(group)
    if stacked is not None:
        return stacked.max()
    numbers = [float(value) for value, _ in group]
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _last(group: Numbers) -> Value | None:
    return next((value for value, _ in reversed(_counted(group))), None)


_REDUCE: dict[Reduction, Callable[[Numbers], Value | None]] = {
    "mean": weighted_mean,
    "sum": _sum,
    "max": _max,
    "last": _last,
}


def _counted(group: Numbers) -> Numbers:
    return [(value, weight) for value, weight in group if weight]


def one_tensor(group: Numbers) -> torch.Tensor | None:
    """The values as one tensor ``(values,)`` on the device of the tensors among them; None if there are none."""
    tensors = [value for value, _ in group if isinstance(value, torch.Tensor)]
    if not tensors:
        return None
    device = tensors[0].device
    # Apple's GPUs have no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len(tensors) == len(group) and len({(t.device, t.dtype) for t in tensors}) == 1:
        return torch.stack(tensors).to(dtype)
    return torch.stack(
        [v.to(device, dtype) if isinstance(v, torch.Tensor) else _constant(v, device, dtype) for v, _ in group]
    )


def _constant(value: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((), value, device=device, dtype=dtype)
