"""Outputs of steps: kept as detached host tensors, and put together for the hooks that want them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from events.errors import CheckpointDamaged
from trainer.data.tensors import clone_tensors, map_tensors
from trainer.errors import EpochOutputsTooLarge, StepOutputError

Notice = Callable[[str], None]
"""Takes a sentence about an output that could only be kept as a list."""

TENSOR_BYTES = 576
"""What a small host tensor costs beside its elements (measured: 564): a million losses are not 4 MB."""


class _Missing:
    """Stands where a step returned fewer outputs than others did."""


_MISSING = _Missing()


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """Bring what a step returned into one form.

    A tuple, list, generator or other iterable is taken apart; a tensor, an array, a string or a number is one
    output; None is no output.

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
            f"a step returned a {type(outputs).__name__} with {names}: return the loss, or a tuple that begins with it"
        )
    # An array is iterable, too, but is one value.
    if isinstance(outputs, Iterable) and not isinstance(outputs, (str, bytes)) and not hasattr(outputs, "__array__"):
        return tuple(outputs)
    return (outputs,)


def detach_copy(outputs: Sequence[Any], *, clone: bool) -> tuple[Any, ...]:
    """Detach every tensor in the outputs, also in containers; what is no tensor stays as it is.

    Args:
        outputs: Of one step.
        clone: Also copy the elements (on the tensor's own device and current stream), so that a later change
            in place does not show. Without it the result shares memory with the outputs.
    """

    def detach(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if clone else tensor.detach()

    return tuple(map_tensors(detach, output) for output in outputs)


def nbytes(outputs: Any) -> int:
    """Bytes that outputs hold: the elements of tensors, and about what Python says of everything else.

    Containers are walked; a tensor that stands in them twice counts twice.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs.numel() * outputs.element_size()
    if isinstance(outputs, Mapping):
        return sum(nbytes(value) for value in outputs.values())
    if isinstance(outputs, (list, tuple)):
        return sum(nbytes(value) for value in outputs)
    return int(getattr(outputs, "nbytes", 0)) or sys.getsizeof(outputs)


def collate_outputs(batches: Sequence[tuple[Any, ...]], notice: Notice | None = None) -> tuple[Any, ...]:
    """Put the outputs of several steps together by position, in time and memory linear in their size.

    - Tensors ``(B, ...)`` with equal dtype, device and trailing shape are concatenated to ``(sum of B,
      ...)``.
    - Scalar tensors ``()`` stack to ``(steps,)``.
    - Everything else becomes a list with one entry per step: tensors that do not fit together, and values
      that are no tensors. Where steps returned different numbers of outputs, the missing ones are None in
      that list.

    Args:
        batches: The outputs of each step; tensors already detached.
        notice: Called once for each position that became a list, with a sentence that says why.

    Returns:
        One value per position; nothing for no steps. The values of a single step are not copied.
    """
    width = max(map(len, batches), default=0)
    columns = [[row[position] if position < len(row) else _MISSING for row in batches] for position in range(width)]
    return _collate_columns(columns, notice)


def _collate_columns(columns: list[list[Any]], notice: Notice | None) -> tuple[Any, ...]:
    """Collate each column; empties ``columns`` as it goes, so that only one is ever held twice."""
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
    """Say why these values cannot be concatenated or stacked; None if they can."""
    missing = sum(value is _MISSING for value in values)
    if missing:
        return f"{missing} of the steps did not return it"
    for value in values:
        if not isinstance(value, torch.Tensor):
            return f"it holds a {type(value).__name__}, which is no tensor"
        if value.layout != torch.strided or value.is_nested:
            return "it holds a sparse or nested tensor"
    first = values[0]
    # Shape objects are compared, not built anew: this runs once per step of an epoch.
    for value in values:
        if value.dtype != first.dtype or value.device != first.device:
            return f"{first.dtype} on {first.device} and {value.dtype} on {value.device} do not go together"
        if value.dim() != first.dim() or value.shape[1:] != first.shape[1:]:
            return f"shapes {tuple(first.shape)} and {tuple(value.shape)} differ beyond their first dimension"
    return None


class OutputCollector:
    """Keeps the outputs of an epoch for a hook at its end, up to a limit in bytes.

    Appending takes the same time whatever was collected before. Not thread-safe: one thread appends,
    collates, clears.
    """

    def __init__(self, limit_bytes: int, owner: str) -> None:
        """Start empty.

        Args:
            limit_bytes: Most that may be kept, Python's overhead per tensor included. `collate` needs, while
                it works, the memory of its largest position once more.
            owner: Who wants the outputs, for the message: ``"Classifier.on_end_val_epoch"``.
        """
        self.limit_bytes = limit_bytes
        self.owner = owner
        self._columns: list[list[Any]] = []
        self._steps = 0
        self._nbytes = 0

    @property
    def steps(self) -> int:
        """How many steps' outputs are kept."""
        return self._steps

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._nbytes

    def append(self, outputs: Sequence[Any]) -> None:
        """Keep the outputs of one step: detached host tensors that nobody changes any more.

        Raises:
            EpochOutputsTooLarge: They would not fit; they are not kept, what was collected before still is.
        """
        size = nbytes(outputs) + TENSOR_BYTES * len(outputs)
        if self._nbytes + size > self.limit_bytes:
            raise EpochOutputsTooLarge(
                f"the outputs that {self.owner} gets at the end of the epoch take more than "
                f"{self.limit_bytes:,} bytes: {self._nbytes:,} after {self._steps:,} steps, and the next one "
                f"adds {size:,}. Return less from the step (predictions instead of logits, sums instead of "
                f"rows), do not override {self.owner}, or raise epoch_outputs_limit_bytes."
            )
        for _ in range(len(self._columns), len(outputs)):  # at the first step; later only where outputs vary
            self._columns.append([_MISSING] * self._steps)
        for position, column in enumerate(self._columns):
            column.append(outputs[position] if position < len(outputs) else _MISSING)
        self._steps += 1
        self._nbytes += size

    def collate(self, notice: Notice | None = None) -> tuple[Any, ...]:
        """Put everything together as `collate_outputs` does and start anew; pieces are let go on the way."""
        columns = self._columns
        self.clear()
        return _collate_columns(columns, notice)

    def kept(self) -> Callable[[], dict[str, Any]]:
        """What is kept by now, as a state; made of it when the returned function is called, on any thread.

        Later steps are only ever appended, and collating changes no column, so nothing is copied here.
        """
        columns, steps, size = list(self._columns), self._steps, self._nbytes
        return lambda: {"steps": steps, "nbytes": size, "columns": [_packed(column[:steps]) for column in columns]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `kept` returned, in memory of its own."""
        try:
            columns = [_unpacked(column) for column in clone_tensors(state["columns"])]
            self._steps, self._nbytes = int(state["steps"]), max(0, int(state["nbytes"]))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointDamaged(f"the checkpoint's outputs cannot be restored: {error!r:.300}") from error
        if any(len(column) != self._steps for column in columns):
            raise CheckpointDamaged("the checkpoint's outputs are not those of its steps; load an older checkpoint")
        self._columns = columns

    def clear(self) -> None:
        """Let everything go."""
        self._columns = []
        self._steps = 0
        self._nbytes = 0


def _packed(values: list[Any]) -> dict[str, Any]:
    """A column in as few tensors as it can be taken apart from again."""
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
