"""Tensors that the ranks have from rank 0."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def followed_buffers(module: nn.Module) -> list[torch.Tensor]:
    """Return the buffers that every pass of training takes from rank 0, as in DistributedDataParallel.

    The statistics of a batch norm are not among them, because only evaluation reads them; nor buffers that are not
    saved, because they can be computed.
    """
    return [
        buffer
        for one in module.modules()
        if not isinstance(one, _NormBase)
        for name, buffer in one.named_buffers(recurse=False)
        if name not in one._non_persistent_buffers_set
    ]


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Copy tensors of rank 0 to all ranks. WAIT: for all ranks."""
    for tensor in tensors:
        value = tensor.detach()
        sent = value.contiguous()
        dist.broadcast(sent, 0)
        if sent is not value:
            value.copy_(sent)
