"""Copy a step's outputs to host memory for observers, which collate them on their own threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from events.bus.backlog import Published
from events.checkpoint.snapshot import Part
from trainer.data.tensor_state import part_of
from trainer.data.tensors import map_tensors
from trainer.errors import EpochOutputsTooLarge
from trainer.hooks.collate import Notice, OutputCollector, Outputs, collate_outputs


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
            clone = tensor.detach().clone()
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
    """The outputs of an epoch's steps for a hook at its end. Filled on the loop's thread.

    Args:
        on_too_large: Called when the outputs exceed their limit; unless it raises, these and all later outputs of the
            epoch are dropped. None: `append` raises.
    """

    def __init__(
        self,
        limit_bytes: int,
        owner: str,
        notice: Notice,
        on_too_large: Callable[[EpochOutputsTooLarge], None] | None = None,
    ) -> None:
        self._collector: OutputCollector | None = OutputCollector(limit_bytes, owner)
        self._notice = notice
        self._on_too_large = on_too_large
        self._lock = threading.Lock()
        self._last: Copy | None = None
        self._collated: Outputs | None = None
        self.shared = False
        """Whether several observers receive them; set at the epoch's end."""

    def append(self, copy: Copy) -> None:
        """Keep one step's outputs, in constant time.

        Raises:
            EpochOutputsTooLarge: The outputs exceed their limit, and there is no ``on_too_large``, or it raised.
        """
        if self._collector is None:
            return
        try:
            self._collector.append(copy.values)
        except EpochOutputsTooLarge as error:
            if self._on_too_large is None:
                raise
            self._on_too_large(error)
            self._collector = self._last = None
        if copy.arrived is not None and self._collector is not None:
            self._last = copy

    def part(self) -> Callable[[], Part]:
        """Return a function that builds the current state for a checkpoint, perhaps later and on another thread."""
        collector, last = self._collector, self._last
        kept = collector.kept() if collector is not None else None

        def make() -> Part:
            if last is not None:
                last.wait()  # the copies before it went through the same stream
            return part_of(kept() if kept is not None else None)

        return make

    def restore(self, kept: Mapping[str, object] | None) -> None:
        """Restore the state from a checkpoint."""
        if self._collector is not None and kept is not None:
            self._collector.restore(kept)

    @property
    def nbytes(self) -> int:
        """Bytes kept so far."""
        return self._collector.nbytes if self._collector is not None else 0

    def collated(self) -> Outputs:
        """As `StepOutputs.collated`."""
        with self._lock:
            if self._collated is None:
                if self._last is not None:
                    self._last.wait()  # the copies before it went through the same stream
                    self._last = None
                self._collated = self._collector.collate(self._notice) if self._collector is not None else ()
        return _clones(self._collated) if self.shared else self._collated


def _clones(outputs: Outputs) -> Outputs:
    return tuple([map_tensors(torch.clone, output) for output in outputs])
