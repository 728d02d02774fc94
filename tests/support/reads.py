"""Detect tensors that are read on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    *("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__complex__"),
    *("__repr__", "__str__", "__format__", "__contains__", "__iter__", "is_nonzero", "equal", "allclose", "nonzero"),
}
aten = torch.ops.aten
OPERATORS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select}


class Calls(TorchFunctionMode):
    """Record the calls of this thread that read a tensor on the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Record the operators of this thread that read a tensor on the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in OPERATORS:
            self.found.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching_reads(found: list[str]) -> Iterator[None]:
    """Record every read of a tensor by this thread, as a Python call and as an operator."""
    with Operators(found), Calls(found):
        yield
