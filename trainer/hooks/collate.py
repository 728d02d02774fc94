"""Keep outputs of steps as detached host tensors and collate them for hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from events.errors import CheckpointDamaged
from trainer.data.tensors import clone_tensors, map_tensors
from trainer.errors import EpochOutputsTooLarge, StepOutputError

Notice = Callable[[str], None]
"""Receives a message about an output that could only be kept as a list."""

TENSOR_BYTES = 576
"""Memory of a small host tensor without its elements (measured: 564): a million losses take more than 4 MB."""


class _Missing:
    """Placeholder for an output of a step that returned fewer outputs than others did."""


_MISSING = _Missing()


def as_tuple(outputs: object) -> tuple[Any, ...]:
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


def detach_copy(outputs: Sequence[object], *, clone: bool) -> tuple[Any, ...]:
    """Detach every tensor in the outputs, also in containers; other values are returned unchanged.

    Args:
        outputs: Of one step.
        clone: Also copy the elements (on the tensor's own device and current stream), for protection from later
            changes in place. Otherwise the result shares memory with the outputs.
    """

    def detach(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if clone else tensor.detach()

    return tuple(map_tensors(detach, output) for output in outputs)


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


def collate_outputs(batches: Sequence[tuple[Any, ...]], notice: Notice | None = None) -> tuple[Any, ...]:
    """Collate the outputs of several steps by position, in time and memory linear in their size.

    - Tensors ``(B, ...)`` with equal dtype, device and trailing shape are concatenated to ``(sum of B,
      ...)``.
    - Scalar tensors ``()`` stack to ``(steps,)``.
    - Other values become a list with one entry per step: tensors of different kinds, and values that are not
      tensors. Missing outputs of steps that returned fewer are None in that list.

    Args:
        batches: The outputs of each step; tensors already detached.
        notice: Called once for each position that became a list, with the reason.

    Returns:
        One value per position; an empty tuple without steps. The values of a single step are not copied.
    """
    width = max(map(len, batches), default=0)
    columns = [[row[position] if position < len(row) else _MISSING for row in batches] for position in range(width)]
    return _collate_columns(columns, notice)


def _collate_columns(columns: list[list[Any]], notice: Notice | None) -> tuple[Any, ...]:
    """Collate each column and remove it from ``columns``, so that at most one is in memory twice."""
    collated: list[Any] = []
    columns.reverse()
    while columns:
        collated.append(_collate_column(columns.pop(), len(collated), notice))
    return tuple(collated)


def _collate_column(values: list[Any], position: int, notice: Notice | None) -> Any:
    reason = _obstacle(values)
    if reason is None:
        first = values[0]
        if first.dim() == 0:
            return first.reshape(1) if len(values) == 1 else torch.stack(values)
        return first if len(values) == 1 else torch.cat(values)
    if notice is not None:
        notice(f"output {position} of the step is kept as a list: {reason}")
    return [None if value is _MISSING else value for value in values]


def _obstacle(values: list[Any]) -> str | None:
    """Describe why these values cannot be concatenated or stacked; None if they can."""
    missing = sum(value is _MISSING for value in values)
    if missing:
        return f"{missing} of the steps did not return it"
    for value in values:
        if not isinstance(value, torch.Tensor):
            return f"it holds a {type(value).__name__}, which is not a tensor"
        if value.layout != torch.strided or value.is_nested:
            return "it holds a sparse or nested tensor"
    first = values[0]
    # Shape objects are compared, not rebuilt: this runs once per step of an epoch.
    for value in values:
        if value.dtype != first.dtype or value.device != first.device:
            return f"{first.dtype} on {first.device} and {value.dtype} on {value.device} differ"
        if value.dim() != first.dim() or value.shape[1:] != first.shape[1:]:
            return f"shapes {tuple(first.shape)} and {tuple(value.shape)} differ beyond their first dimension"
    return None


class OutputCollector:
    """Keeps the outputs of an epoch for a hook at its end, up to a limit in bytes.

    Appending takes constant time. Not thread-safe: one thread appends, collates, clears.
    """

    def __init__(self, limit_bytes: int, owner: str) -> None:
        """Start empty.

        Args:
            limit_bytes: Maximum bytes per epoch, including Python's overhead per tensor. `collate` temporarily needs
                the memory of its largest position a second time.
            owner: The hook, for the message: ``"Classifier.on_end_val_epoch"``.
        """
        self.limit_bytes = limit_bytes
        self.owner = owner
        self._columns: list[list[Any]] = []
        self._steps = 0
        self._nbytes = 0

    @property
    def steps(self) -> int:
        """Number of steps whose outputs are kept."""
        return self._steps

    @property
    def nbytes(self) -> int:
        """Bytes of the kept outputs."""
        return self._nbytes

    def append(self, outputs: Sequence[object]) -> None:
        """Keep the outputs of one step: detached host tensors that do not change any more.

        Raises:
            EpochOutputsTooLarge: They exceed the limit; they are not kept, but earlier outputs are.
        """
        size = nbytes(outputs) + TENSOR_BYTES * len(outputs)
        if self._nbytes + size > self.limit_bytes:
            raise EpochOutputsTooLarge(
                f"the outputs for {self.owner} at the end of the epoch exceed {self.limit_bytes:,} bytes:"
                f" {self._nbytes:,} after {self._steps:,} steps, and the next one adds {size:,}; return less from the"
                f" step (predictions instead of logits), or raise epoch_outputs_limit_bytes"
            )
        for _ in range(len(self._columns), len(outputs)):  # at the first step; later only where outputs vary
            self._columns.append([_MISSING] * self._steps)
        for position, column in enumerate(self._columns):
            column.append(outputs[position] if position < len(outputs) else _MISSING)
        self._steps += 1
        self._nbytes += size

    def collate(self, notice: Notice | None = None) -> tuple[Any, ...]:
        """Collate as `collate_outputs` does and clear; the memory of each position is released on the way."""
        columns = self._columns
        self.clear()
        return _collate_columns(columns, notice)

    def kept(self) -> Callable[[], dict[str, Any]]:
        """Return a function that builds the current state; it may be called later, on any thread.

        Nothing is copied here, because later steps are only appended, and collating does not change a column.
        """
        columns, steps, size = list(self._columns), self._steps, self._nbytes
        return lambda: {"steps": steps, "nbytes": size, "columns": [_packed(column[:steps]) for column in columns]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `kept` built, in memory of its own."""
        try:
            columns = [_unpacked(column) for column in clone_tensors(state["columns"])]
            self._steps, self._nbytes = int(state["steps"]), max(0, int(state["nbytes"]))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointDamaged(f"the checkpoint's outputs cannot be restored: {error!r:.300}") from error
        if any(len(column) != self._steps for column in columns):
            raise CheckpointDamaged("the checkpoint's outputs are not those of its steps; load an older checkpoint")
        self._columns = columns

    def clear(self) -> None:
        """Release all outputs."""
        self._columns = []
        self._steps = 0
        self._nbytes = 0


def _packed(values: list[Any]) -> dict[str, Any]:
    """Encode a column as few tensors, from which `_unpacked` restores it."""
    if not values or _obstacle(values) is not None:
        there = [value is not _MISSING for value in values]
        return {"values": [None if value is _MISSING else value for value in values], "there": there}
    if values[0].dim() == 0:
        return {"stacked": torch.stack(values)}
    return {"rows": [len(value) for value in values], "joined": torch.cat(values)}


def _unpacked(column: dict[str, Any]) -> list[Any]:
    if "stacked" in column:
        return list(column["stacked"].unbind())
    if "joined" in column:
        return list(column["joined"].split(column["rows"]))
    return [value if there else _MISSING for value, there in zip(column["values"], column["there"], strict=True)]
