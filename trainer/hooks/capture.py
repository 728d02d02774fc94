"""Copy a step's outputs to host memory for observers, which collate them on their own threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from events.bus.backlog import Published
from events.checkpoint.snapshot import Part
from events.errors import CheckpointDamaged
from trainer.data.tensor_state import part_of
from trainer.data.tensors import clone_tensors, map_tensors
from trainer.distributed.local import whole
from trainer.errors import EpochOutputsTooLarge
from trainer.hooks.collate import (
    MISSING,
    TENSOR_BYTES,
    Notice,
    Outputs,
    collate_columns,
    collate_outputs,
    nbytes,
    pack_column,
    unpack_column,
)


class Capture:
    """Copies step outputs to the host. Used on the loop's thread; never waits.

    On CUDA the tensors are cloned on the compute stream, so that later changes do not show, and copied to pinned memory
    on a stream of their own. On the CPU they are cloned, too: the user's code may write to them in its next step.

    Args:
        device: The run's.
        notice: Called once with the reason if an output could not be concatenated.
    """

    def __init__(self, device: torch.device, notice: Notice) -> None:
        self._device = device
        self._notice = notice
        self._collating = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, outputs: Outputs) -> Copy:
        """Start a copy; `Copy.wait` completes it."""
        if self._stream is None and len(outputs) == 1 and type(outputs[0]) is torch.Tensor and outputs[0].is_cpu:
            clone = outputs[0].detach().clone()  # the most frequent case: a loss alone
            return Copy((clone,), clone.nbytes)
        nbytes = 0
        on_device: list[tuple[torch.Tensor, torch.Tensor]] = []

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal nbytes
            nbytes += tensor.nbytes
            clone = whole(tensor.detach()).clone()  # WAIT: for all ranks, if the tensor is divided among them
            if clone.device.type == "cpu":
                return clone
            if self._stream is None:  # SYNC: an accelerator without CUDA's streams
                return clone.to("cpu")
            host = torch.empty(clone.shape, dtype=clone.dtype, device="cpu", pin_memory=True)
            on_device.append((clone, host))
            return host

        copied = tuple([map_tensors(copy, output) for output in outputs])
        return Copy(copied, nbytes, self._to_host(on_device) if on_device else None)

    def of_step(self, copies: list[Copy], shared: bool = False) -> StepOutputs:
        """The outputs of one step, for the payload of its event. ``shared``: several observers receive them."""
        return StepOutputs(copies, self._notice, self._collating, shared)

    def _to_host(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for clone, host in pairs:
                host.copy_(clone, non_blocking=True)
                clone.record_stream(self._stream)  # its memory is not reused before the copy is complete
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return arrived


# Thousands of these are queued for a slow observer, never in a cycle: `gc=False` spares the collector the walk.
class Copy(msgspec.Struct, gc=False):
    """The outputs of one micro-batch: host tensors whose copy may still be in progress."""

    values: tuple[Any, ...]
    nbytes: int
    arrived: torch.cuda.Event | None = None
    """Recorded after the copies from a device; None without any."""

    def wait(self) -> Outputs:
        """The values; waits for the copy, so never call it on the loop's thread."""
        if self.arrived is not None:
            self.arrived.synchronize()  # WAIT: for the device, on an observer's thread
        return self.values


class StepOutputs(msgspec.Struct, gc=False):
    """The outputs of one optimizer step's micro-batches, shared by the callbacks that read them."""

    copies: list[Copy]
    notice: Notice
    lock: threading.Lock
    """Shared by all steps, because two observers seldom collate at once."""
    shared: bool = False
    result: Outputs | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return sum([copy.nbytes for copy in self.copies])

    def of_one_batch(self) -> tuple[torch.Tensor, ...] | None:
        """The values, if they are dense host tensors of one micro-batch, not yet collated; else None."""
        copies = self.copies
        if len(copies) != 1 or copies[0].arrived is not None:
            return None
        values = copies[0].values
        for value in values:
            if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_nested:
                return None
        return values

    def collated(self) -> Outputs:
        """One value per output position; computed once, on the thread of the first caller.

        A caller may change the tensors: shared outputs are cloned for each.
        """
        with self.lock:
            if self.result is None:
                self.result = collate_outputs([copy.wait() for copy in self.copies], self.notice)
                self.copies = []
        return _clones(self.result) if self.shared else self.result


_SMALL_BYTES = 4_096


def collate_steps(batch: Sequence[Published]) -> dict[int, tuple[torch.Tensor, ...]]:
    """Collate the outputs of many steps as `StepOutputs.collated` does; by index in the batch.

    The numbers of all steps are stacked in one call. Each call of torch releases the interpreter lock, for which this
    thread competes with the loop: several calls per step would make both wait for each other.

    Returns:
        The outputs of steps with one micro-batch that returned tensors. Other steps are skipped, and so are large
        shared outputs, whose clones would double the memory of the batch.
    """
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    copied: set[int] = set()
    numbers: dict[torch.dtype, list[torch.Tensor]] = {}
    for index, (_, payload) in enumerate(batch):
        outputs = payload.outputs if payload is not None else None
        if type(outputs) is not StepOutputs or (values := outputs.of_one_batch()) is None:
            continue
        if outputs.shared:
            if payload is not None and payload.nbytes > _SMALL_BYTES:
                continue
            copied.add(index)
        for value in values:
            if not value.dim():
                numbers.setdefault(value.dtype, []).append(value)
        found[index] = values
    views = {dtype: iter(torch.stack(values).unsqueeze(1).unbind()) for dtype, values in numbers.items()}
    for index, values in found.items():
        found[index] = tuple(
            [
                next(views[value.dtype]) if not value.dim() else value.clone() if index in copied else value
                for value in values
            ]
        )
    return found


class EpochOutputs:
    """Keeps the outputs of an epoch's steps for a hook at its end, up to a limit. Filled on the loop's thread.

    Args:
        limit_bytes: Maximum bytes per epoch, including Python's overhead per tensor. `collated` temporarily needs the
            memory of its largest position a second time.
        owner: The hook, for the message: ``"Classifier.on_end_val_epoch"``.
        notice: Called once for each position that becomes a list, with the reason.
        on_too_large: Called when the outputs exceed their limit; unless it raises, these and all later outputs of the
            epoch are dropped. None: `append` raises.
    """

    def __init__(
        self,
        limit_bytes: int,
        owner: str,
        notice: Notice | None,
        on_too_large: Callable[[EpochOutputsTooLarge], None] | None = None,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._owner = owner
        self._notice = notice
        self._on_too_large = on_too_large
        self._lock = threading.Lock()
        self._columns: list[list[object]] = []
        """The outputs of each position, by step."""
        self._last: Copy | None = None
        self._is_dropped = False
        self._collated: Outputs | None = None
        self.steps = 0
        """Number of steps whose outputs are kept."""
        self.nbytes = 0
        """Bytes kept so far."""
        self.numbers: list[Any] = []
        """With several ranks: the place of each step that is kept, in the order of all ranks."""
        self.shared = False
        """Whether several observers receive them; set at the epoch's end."""

    def append(self, copy: Copy, number: object = None) -> None:
        """Keep one step's outputs, in constant time.

        Args:
            number: With several ranks: its place in the order of all ranks.

        Raises:
            EpochOutputsTooLarge: The outputs exceed their limit, and there is no ``on_too_large``, or it raised.
                Earlier outputs are kept.
        """
        if self._is_dropped:
            return
        values = copy.values
        size = nbytes(values) + TENSOR_BYTES * len(values)
        if self.nbytes + size > self._limit_bytes:
            self._drop(f"{self.nbytes:,} after {self.steps:,} steps, and the next one adds {size:,}")
            return
        for _ in range(len(self._columns), len(values)):  # at the first step; later only where outputs vary
            self._columns.append([MISSING] * self.steps)
        for position, column in enumerate(self._columns):
            column.append(values[position] if position < len(values) else MISSING)
        self.steps += 1
        if number is not None:
            self.numbers.append(number)
        self.nbytes += size
        if copy.arrived is not None:
            self._last = copy

    def _drop(self, found: str) -> None:
        error = EpochOutputsTooLarge(
            f"the outputs for {self._owner} at the end of the epoch exceed {self._limit_bytes:,} bytes: {found}; return"
            f" less from the step (predictions instead of logits), or raise epoch_outputs_limit_bytes"
        )
        if self._on_too_large is None:
            raise error
        self._on_too_large(error)
        self._is_dropped, self._last = True, None
        self._take_columns()

    def part(self) -> Callable[[], Part]:
        """Return a function that builds the current state for a checkpoint, perhaps later and on another thread.

        Nothing is copied here, because later steps are only appended, and collating does not change a column.
        """
        columns, steps, size, last = list(self._columns), self.steps, self.nbytes, self._last
        is_dropped, numbers = self._is_dropped, self.numbers

        def make() -> Part:
            if is_dropped:
                return part_of(None)
            if last is not None:
                last.wait()  # the copies before it went through the same stream
            packed = [pack_column(one[:steps]) for one in columns]
            return part_of({"steps": steps, "nbytes": size, "columns": packed, "numbers": numbers[:steps]})

        return make

    def restore(self, kept: Mapping[int, Mapping[str, Any] | None], *, ranks: int = 1) -> None:
        """Restore the state from a checkpoint, in memory of its own, in the order of all ranks.

        Args:
            kept: What ranks of the checkpoint's run have kept, by rank; None of one that has dropped its outputs.
            ranks: Of this run.

        Raises:
            CheckpointDamaged: It is not what `part` returns.
        """
        rows: list[tuple[tuple[int, ...], Sequence[object]]] = []
        for rank, one in kept.items():
            if one is None:
                continue
            try:
                columns = [unpack_column(column) for column in clone_tensors(one["columns"])]
                steps, size = int(one["steps"]), max(0, int(one["nbytes"]))
                # A single process numbers nothing: its outputs are in order, and before those of this attempt.
                numbers: list[tuple[int, ...]]
                numbers = [(*map(int, n), rank) for n in one.get("numbers", ())] or [(-1, i) for i in range(steps)]
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise CheckpointDamaged(f"the checkpoint's outputs cannot be restored: {error!r:.300}") from error
            if len(numbers) != steps or any(len(column) != steps for column in columns):
                raise CheckpointDamaged("the checkpoint's outputs are not those of its steps; load an older checkpoint")
            rows += zip(numbers, zip(*columns, strict=True) if columns else [()] * steps, strict=True)
            self.nbytes += size
        rows.sort(key=lambda row: row[0])
        width = max((len(values) for _, values in rows), default=0)
        self._columns = [[v[position] if position < len(v) else MISSING for _, v in rows] for position in range(width)]
        self.steps, self.numbers = len(rows), [number for number, _ in rows] if ranks > 1 else []

    def exchange(self, exchange: Callable[[Any], list[Any]], *, adopts: bool) -> None:
        """Take over the outputs of all ranks, in the order of `numbers`. WAIT: for the device, and for all ranks.

        Args:
            exchange: Returns this value of each rank, or nothing where it is not wanted.
            adopts: Whether this rank has a use for those of the others.

        Raises:
            EpochOutputsTooLarge: As `append`.
        """
        if self._last is not None:
            self._last.wait()
        mine = [] if self._is_dropped else [pack_column(column) for column in self._columns]
        everyone = exchange((self.nbytes, [] if self._is_dropped else self.numbers, mine))
        if not adopts or self._is_dropped:
            return
        size = sum(nbytes for nbytes, _, _ in everyone)
        if size > self._limit_bytes:
            self._drop(f"{size:,} of all ranks together")
            return
        steps = [(number, rank, i) for rank, (_, own, _) in enumerate(everyone) for i, number in enumerate(own)]
        unpacked = [[unpack_column(column) for column in columns] for _, _, columns in everyone]
        width = max(map(len, unpacked), default=0)
        self._columns = [
            [unpacked[rank][position][i] if position < len(unpacked[rank]) else MISSING for _, rank, i in sorted(steps)]
            for position in range(width)
        ]
        self.steps, self.nbytes, self._last = len(steps), size, None

    def collated(self) -> Outputs:
        """As `StepOutputs.collated`; the memory of each position is released on the way."""
        with self._lock:
            if self._collated is None:
                if self._last is not None:
                    self._last.wait()  # the copies before it went through the same stream
                    self._last = None
                self._collated = collate_columns(self._take_columns(), self._notice)
        return _clones(self._collated) if self.shared else self._collated

    def _take_columns(self) -> list[list[object]]:
        columns, self._columns, self.steps, self.nbytes = self._columns, [], 0, 0
        return columns


def _clones(outputs: Outputs) -> Outputs:
    return tuple([map_tensors(torch.clone, output) for output in outputs])
