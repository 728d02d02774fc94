"""Count the rows of a batch, and its weight in accumulation and means. Reads shapes only, never a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader, Sampler, Subset, default_collate

from trainer.data.loaders import own_batches
from trainer.data.tensors import parts_of
from trainer.errors import BatchWeightError

_Count = TypeVar("_Count", int, float)
CountRows = Callable[[object, int], int | None]
"""Maps a batch and its index in the epoch to its rows; None if they cannot be counted."""


def row_counter(
    loader: Iterable[object],
    batch_size: int,
    sampler_cls: type[Sampler[int]],
    notice: Callable[[str], None] | None,
    where: str,
) -> CountRows:
    """Return a function that counts the rows of each batch of a loader.

    With torch's own collation and the trainer's sampler, the indices determine them. Other batches are inspected,
    because a ``collate_fn`` or the data set may drop or merge rows.

    Args:
        batch_size: The batch size that the module received.
        notice: Called with a warning about a count that may be wrong. None: the count is not used.
        where: The method that returned the loader, for the warning.
    """
    indices = own_batches(loader, sampler_cls)
    if indices is not None and _keeps_rows(loader):
        known = indices
        return lambda batch, index: known(index) or None
    if notice is None:
        return lambda batch, index: _rows_of_tensors(batch) or count_rows(batch, None).rows
    warn = notice
    of_torch = isinstance(loader, DataLoader)
    own_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if of_torch else None
    usual = own_size if isinstance(own_size, int) else None if of_torch else batch_size
    total = _samples_of(loader) if of_torch else None
    announced = False

    def count(batch: object, index: int) -> int | None:
        nonlocal announced
        expected = usual if indices is None else indices(index) or None
        if expected is not None and _rows_of_tensors(batch) == expected:  # most batches
            return expected
        if indices is None and expected is not None and total is not None:
            expected = min(expected, total - index * expected)  # the last batch may be smaller
            expected = expected if expected > 0 else None
        rows, doubt = count_rows(batch, expected, exceeds=of_torch)
        if doubt is not None and not announced:
            announced = True
            counted = "1" if rows is None else str(rows)
            warn(f"rows of {where}() are a guess: a batch counts {counted}, as {doubt}; define batch_weight to choose")
        return rows

    return count


def _keeps_rows(loader: Any) -> bool:
    """Whether a batch has one row for each of its indices."""
    if loader.collate_fn is not default_collate:
        return False
    data = loader.dataset
    while type(data) is Subset:  # its `__getitems__` calls that of the wrapped data set
        data = data.dataset
    return not hasattr(data, "__getitems__")  # which may return fewer rows than indices


def _samples_of(loader: Any) -> int | None:
    """The samples of an epoch, if torch's own `BatchSampler` creates the batches."""
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler or not isinstance(batches.sampler, Sized):
        return None
    try:
        return len(batches.sampler)
    except (TypeError, NotImplementedError):  # a data set without a length
        return None


def _rows_of_tensors(batch: Any) -> int | None:
    """The rows of a tensor, or of a list or tuple of tensors that all have the same number. Runs in every step."""
    kind = type(batch)
    if kind is torch.Tensor:
        return batch.size(0) if batch.dim() else None
    if kind is not tuple and kind is not list:
        return None
    rows: int | None = None
    for part in batch:
        if type(part) is not torch.Tensor or not part.dim():
            return None
        if rows is None:
            rows = part.size(0)
        elif rows != part.size(0):
            return None
    return rows


class Count(NamedTuple):
    """The rows of a batch, and the reason why the count may be wrong."""

    rows: int | None
    doubt: str | None


def count_rows(batch: object, expected: int | None, *, exceeds: bool = False) -> Count:
    """Count the rows of a batch: the first dimension of its first tensor that is not a scalar.

    Args:
        expected: The requested rows.
        exceeds: Doubt a batch with more rows.
    """
    if expected is not None and _rows_of_tensors(batch) == expected:
        return Count(expected, None)
    found: list[tuple[int, ...]] = []
    graphs = _shapes(batch, found)
    if graphs is not None:
        return Count(graphs, "it is a batch of graphs, counted by num_graphs")
    shapes = [shape for shape in found if shape]
    if not shapes:
        what = "all its tensors are scalars" if found else f"a {type(batch).__name__} without a tensor"
        return Count(None, what)
    rows = shapes[0][0]
    if rows != expected and expected is not None:
        for entries in (batch, next(iter(batch), None) if isinstance(batch, (list, tuple)) else None):
            if not isinstance(entries, (list, tuple)) or (entries is batch and not _holds_samples(batch)):
                continue
            if len(entries) == expected:
                return Count(expected, f"it holds a list of {expected} entries, not tensors of {expected} rows")
    others = sorted({shape[0] for shape in shapes})
    if len(others) > 1:
        lengths = " and ".join([", ".join(map(str, others[:3])), "more"] if len(others) > 3 else map(str, others))
        rows = expected if expected in others else rows
        return Count(rows, f"the first dimensions of its tensors differ ({lengths})")
    if not found[0]:
        return Count(rows, "it begins with a scalar tensor, so a later tensor was counted")
    if rows == expected:
        return Count(rows, None)
    if expected is not None and all(len(shape) > 1 and shape[1] == expected for shape in shapes):
        return Count(rows, f"its second dimension has the requested {expected} rows (time first?)")
    if exceeds and expected is not None and rows > expected:
        return Count(rows, f"the dataloader makes batches of {expected}")
    if isinstance(batch, (list, tuple)) and len(batch) == expected and len(set(shapes)) == 1 and len(shapes[0]) > 1:
        return Count(rows, f"it is a {type(batch).__name__} of {expected} tensors of one shape, which may be samples")
    if _holds_samples(batch):
        return Count(rows, "it holds tensors only in containers, which may be samples")
    return Count(rows, None)


def _holds_samples(batch: object) -> bool:
    """Whether a batch looks like a list of samples or images, rather than inputs and targets."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        return False
    if all(isinstance(part, torch.Tensor) for part in batch):
        return len({part.shape[:1] for part in batch}) > 1 or len(batch) > 3
    return all(isinstance(part, (list, tuple, Mapping)) for part in batch)


def _shapes(value: object, found: list[tuple[int, ...]]) -> int | None:
    """Add the shapes of all tensors and arrays, depth first; return the number of graphs of a batch of graphs."""
    if isinstance(value, torch.Tensor):
        found.append(tuple(value.shape) if not value.is_nested else (value.size(0),))
        return None
    if isinstance(value, PackedSequence):
        found.append((int(value.batch_sizes[0]),))  # sequences, not tokens; always a host tensor
        return None
    if isinstance(value, (str, bytes, int, float, type)) or value is None:
        return None
    parts = parts_of(value)
    if parts is None:
        graphs = getattr(value, "num_graphs", None)
        if isinstance(graphs, int):
            return graphs
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and hasattr(value, "__array__"):
            found.append(shape)
        return None
    for _, part in parts:
        graphs = _shapes(part, found)
        if graphs is not None:
            return graphs
    return None


def checked_weight(weight: Any, module: str) -> float:
    """Convert the result of `ModuleInterface.batch_weight` into a number; never waits for a device.

    Raises:
        BatchWeightError: It is a tensor on a device, not one number, not finite, or negative.
    """
    where = f"{module}.batch_weight() returned"
    if isinstance(weight, torch.Tensor) and weight.device.type != "cpu":
        raise BatchWeightError(
            f"{where} a tensor on {weight.device}; count on the host, where the dataloader's batch is"
        )
    if isinstance(weight, complex) or not hasattr(weight, "__float__"):
        raise BatchWeightError(f"{where} {weight!r:.80}, which is not a number; return the batch's weight")
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchWeightError(f"{where} {weight!r:.80}, which is not one number; return the batch's weight") from error
    if not math.isfinite(number) or number < 0:
        raise BatchWeightError(f"{where} {number}; return a finite number from 0")
    return number


def weight_of(module: object) -> Callable[[object], float] | None:
    """The module's own `ModuleInterface.batch_weight`, checked at each call; None if it has none."""
    method = getattr(module, "batch_weight", None)
    if method is None or getattr(getattr(method, "__func__", method), "__module__", None) == "trainer.module_interface":
        return None
    name = type(module).__name__
    return lambda batch: checked_weight(method(batch), name)


def no_weight(module: object, step: int) -> BatchWeightError:
    """The error for a step whose batches all have weight 0."""
    return BatchWeightError(
        f"{type(module).__name__}.batch_weight() returned 0 for all of step {step}; remove such batches from the"
        f" dataloader"
    )


def shares_of(weights: list[float | None]) -> list[float]:
    """Return each micro-batch's part of its step: equal ones where a weight is not known, or all are 0."""
    total = sum_of(weights)
    return [(weight or 0) / total for weight in weights] if total else [1 / len(weights)] * len(weights)


def sum_of(counts: Sequence[_Count | None]) -> _Count | None:
    """Return the sum; None if one of them is not known."""
    known = [count for count in counts if count is not None]
    return sum(known[1:], known[0]) if known and len(known) == len(counts) else None
