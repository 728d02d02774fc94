"""Tensors that are divided among ranks: torch's ``DTensor``."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_split(value: object) -> TypeIs[DTensor]:
    """Whether a value is a ``DTensor``. Does not import torch's distributed packages."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, which shares its memory; any other tensor is returned as it is."""
    return tensor.to_local() if is_split(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; WAIT: for all ranks of its mesh, if it is divided, each of which must call this."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def add_up(numbers: torch.Tensor, like: DTensor) -> torch.Tensor:
    """Add numbers of this rank's part of a tensor to those of the other parts, in place. WAIT: for all ranks."""
    dist: Any = importlib.import_module("torch.distributed")
    for dimension, placement in enumerate(like.placements):
        if placement.is_shard():
            dist.all_reduce(numbers, group=like.device_mesh.get_group(dimension))
    return numbers
