"""Keep outputs of steps as detached host tensors and collate them for hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from trainer.data.tensors import map_tensors
from trainer.errors import StepOutputError

Outputs = tuple[object, ...]
"""The outputs of a step, or one collated value per output."""
Notice = Callable[[str], None]
"""Receives a message about an output that could only be kept as a list."""

TENSOR_BYTES = 576
"""Memory of a small host tensor without its elements (measured: 564): a million losses take more than 4 MB."""


MISSING = object()
"""Placeholder for an output of a step that returned fewer outputs than others did."""


def as_tuple(outputs: object) -> Outputs:
    """Convert a step's return value into a tuple of outputs.

    The items of a tuple, list, generator or other iterable are outputs; a tensor, an array, a string or a number is
    one output; None means no outputs.

    Raises:
        StepOutputError: A mapping: outputs are positional.
    """
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    if type(outputs) is tuple:
        return outputs
    if outputs is None:
        return ()
    if isinstance(outputs, Mapping):
        names = ", ".join(map(str, outputs))
        raise StepOutputError(
            f"a step returned a {type(outputs).__name__} with {names}; return the loss, or a tuple that begins with it"
        )
    # An array is one value, although it is iterable.
    if isinstance(outputs, Iterable) and not isinstance(outputs, (str, bytes)) and not hasattr(outputs, "__array__"):
        return tuple(outputs)
    return (outputs,)


def detached(outputs: Outputs) -> Outputs:
    """Detach every tensor in the outputs, also in containers; the memory is shared."""
    return tuple([map_tensors(torch.Tensor.detach, output) for output in outputs])


def nbytes(outputs: object) -> int:
    """Bytes of outputs: the elements of tensors, and approximately the size of other objects.

    Containers are walked; a tensor that they hold twice counts twice.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs.numel() * outputs.element_size()
    if isinstance(outputs, Mapping):
        return sum(nbytes(value) for value in outputs.values())
    if isinstance(outputs, (list, tuple)):
        return sum(nbytes(value) for value in outputs)
    return int(getattr(outputs, "nbytes", 0)) or sys.getsizeof(outputs)


def collate_outputs(batches: Sequence[Outputs], notice: Notice | None = None) -> Outputs:
    """Collate the outputs of several steps by position, in time and memory linear in their size.

    - Tensors ``(B, ...)`` with equal dtype, device and trailing shape are concatenated to ``(sum of B, ...)``.
    - Scalar tensors ``()`` stack to ``(steps,)``.
    - Other values become a list with one entry per step: tensors of different kinds, and values that are not tensors.
      Missing outputs of steps that returned fewer are None in that list.

    Args:
        batches: The outputs of each step; tensors already detached.
        notice: Called once for each position that became a list, with the reason.

    Returns:
        One value per position; an empty tuple without steps. The values of a single step are not copied.
    """
    width = max(map(len, batches), default=0)
    columns = [[row[position] if position < len(row) else MISSING for row in batches] for position in range(width)]
    return collate_columns(columns, notice)


def collate_columns(columns: list[list[object]], notice: Notice | None) -> Outputs:
    """Collate each column and remove it from ``columns``, so that at most one is in memory twice."""
    collated: list[object] = []
    columns.reverse()
    while columns:
        collated.append(_collate_column(columns.pop(), len(collated), notice))
    return tuple(collated)


def _collate_column(values: list[object], position: int, notice: Notice | None) -> object:
    tensors = _alike(values)
    if not isinstance(tensors, str):
        first = tensors[0]
        if first.dim() == 0:
            return first.reshape(1) if len(tensors) == 1 else torch.stack(tensors)
        return first if len(tensors) == 1 else torch.cat(tensors)
    if notice is not None:
        notice(f"output {position} of the step is kept as a list: {tensors}")
    return [None if value is MISSING else value for value in values]


def _alike(values: list[object]) -> list[torch.Tensor] | str:
    """Return the values if they are tensors that can be concatenated or stacked, else the reason why not."""
    if missing := sum(value is MISSING for value in values):
        return f"{missing} of the steps did not return it"
    tensors: list[torch.Tensor] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            return f"it holds a {type(value).__name__}, which is not a tensor"
        if value.layout != torch.strided or value.is_nested:
            return "it holds a sparse or nested tensor"
        tensors.append(value)
    first = tensors[0]
    # Shape objects are compared, not rebuilt: this runs once per step of an epoch.
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"{first.dtype} on {first.device} and {tensor.dtype} on {tensor.device} differ"
        if tensor.dim() != first.dim() or tensor.shape[1:] != first.shape[1:]:
            return f"shapes {tuple(first.shape)} and {tuple(tensor.shape)} differ beyond their first dimension"
    return tensors


def pack_column(values: list[object]) -> dict[str, object]:
    """Encode a column as few tensors, from which `unpack_column` restores it."""
    tensors = _alike(values) if values else ""
    if isinstance(tensors, str):
        there = [value is not MISSING for value in values]
        return {"values": [None if value is MISSING else value for value in values], "there": there}
    if tensors[0].dim() == 0:
        return {"stacked": torch.stack(tensors)}
    return {"rows": [len(tensor) for tensor in tensors], "joined": torch.cat(tensors)}


def unpack_column(column: Mapping[str, Any]) -> list[object]:
    """Restore the values of a column; raise the error of the first invalid one."""
    if "stacked" in column:
        return list(column["stacked"].unbind())
    if "joined" in column:
        return list(column["joined"].split(column["rows"]))
    return [value if there else MISSING for value, there in zip(column["values"], column["there"], strict=True)]
