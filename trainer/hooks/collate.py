"""Keep outputs of steps as detached host tensors and collate them for hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from events.errors import CheckpointDamaged
from trainer.data.tensors import clone_tensors, map_tensors
from trainer.errors import EpochOutputsTooLarge, StepOutputError

Outputs = tuple[object, ...]
"""The outputs of a step, or one collated value per output."""
Notice = Callable[[str], None]
"""Receives a message about an output that could only be kept as a list."""

TENSOR_BYTES = 576
"""Memory of a small host tensor without its elements (measured: 564): a million losses take more than 4 MB."""


_MISSING = object()
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
    columns = [[row[position] if position < len(row) else _MISSING for row in batches] for position in range(width)]
    return _collate_columns(columns, notice)


def _collate_columns(columns: list[list[object]], notice: Notice | None) -> Outputs:
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
    return [None if value is _MISSING else value for value in values]


def _alike(values: list[object]) -> list[torch.Tensor] | str:
    """Return the values if they are tensors that can be concatenated or stacked, else the reason why not."""
    if missing := sum(value is _MISSING for value in values):
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


class OutputCollector:
    """Keeps the outputs of an epoch for a hook at its end, up to a limit in bytes.

    Appending takes constant time. Not thread-safe: one thread appends and collates.

    Args:
        limit_bytes: Maximum bytes per epoch, including Python's overhead per tensor. `collate` temporarily needs the
            memory of its largest position a second time.
        owner: The hook, for the message: ``"Classifier.on_end_val_epoch"``.
    """

    def __init__(self, limit_bytes: int, owner: str) -> None:
        self._limit_bytes = limit_bytes
        self._owner = owner
        self._columns: list[list[object]] = []
        self.steps = 0
        """Number of steps whose outputs are kept."""
        self.nbytes = 0
        """Bytes of the kept outputs."""

    def append(self, outputs: Sequence[object]) -> None:
        """Keep the outputs of one step: detached host tensors that do not change any more.

        Raises:
            EpochOutputsTooLarge: They exceed the limit; they are not kept, but earlier outputs are.
        """
        size = nbytes(outputs) + TENSOR_BYTES * len(outputs)
        if self.nbytes + size > self._limit_bytes:
            raise EpochOutputsTooLarge(
                f"the outputs for {self._owner} at the end of the epoch exceed {self._limit_bytes:,} bytes:"
                f" {self.nbytes:,} after {self.steps:,} steps, and the next one adds {size:,}; return less from the"
                f" step (predictions instead of logits), or raise epoch_outputs_limit_bytes"
            )
        for _ in range(len(self._columns), len(outputs)):  # at the first step; later only where outputs vary
            self._columns.append([_MISSING] * self.steps)
        for position, column in enumerate(self._columns):
            column.append(outputs[position] if position < len(outputs) else _MISSING)
        self.steps += 1
        self.nbytes += size

    def collate(self, notice: Notice | None = None) -> Outputs:
        """Collate as `collate_outputs` does and clear; the memory of each position is released on the way."""
        columns, self._columns, self.steps, self.nbytes = self._columns, [], 0, 0
        return _collate_columns(columns, notice)

    def kept(self) -> Callable[[], dict[str, object]]:
        """Return a function that builds the current state; it may be called later, on any thread.

        Nothing is copied here, because later steps are only appended, and collating does not change a column.
        """
        columns, steps, size = list(self._columns), self.steps, self.nbytes
        return lambda: {"steps": steps, "nbytes": size, "columns": [_packed(column[:steps]) for column in columns]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `kept` built, in memory of its own."""
        try:
            columns = [_unpacked(column) for column in clone_tensors(state["columns"])]
            self.steps, self.nbytes = int(state["steps"]), max(0, int(state["nbytes"]))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointDamaged(f"the checkpoint's outputs cannot be restored: {error!r:.300}") from error
        if any(len(column) != self.steps for column in columns):
            raise CheckpointDamaged("the checkpoint's outputs are not those of its steps; load an older checkpoint")
        self._columns = columns


def _packed(values: list[object]) -> dict[str, object]:
    """Encode a column as few tensors, from which `_unpacked` restores it."""
    tensors = _alike(values) if values else ""
    if isinstance(tensors, str):
        there = [value is not _MISSING for value in values]
        return {"values": [None if value is _MISSING else value for value in values], "there": there}
    if tensors[0].dim() == 0:
        return {"stacked": torch.stack(tensors)}
    return {"rows": [len(tensor) for tensor in tensors], "joined": torch.cat(tensors)}


def _unpacked(column: Mapping[str, Any]) -> list[object]:
    if "stacked" in column:
        return list(column["stacked"].unbind())
    if "joined" in column:
        return list(column["joined"].split(column["rows"]))
    return [value if there else _MISSING for value, there in zip(column["values"], column["there"], strict=True)]
