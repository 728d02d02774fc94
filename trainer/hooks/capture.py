"""Takes what a step returned off the loop's thread: detached copies in host memory, collated by whoever needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from events.bus.backlog import Published
from events.checkpoint.snapshot import Part
from trainer.data.tensor_state import part_of
from trainer.data.tensors import map_tensors
from trainer.errors import EpochOutputsTooLarge
from trainer.hooks.collate import Notice, OutputCollector, collate_outputs


class Capture:
    """Copies step outputs to the host. Used on the loop's thread; waits for nothing.

    On CUDA the tensors are cloned on the compute stream, where they cannot change any more, and copied to pinned memory
    on a stream of their own. On the CPU they are cloned too: the user's code may write to them in its next step.

    Args:
        device: The run's.
        notice: Told once why an output could not be concatenated.
    """

    def __init__(self, device: torch.device, notice: Notice) -> None:
        self._device = device
        self._notice = notice
        self._collating = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self, outputs: tuple[Any, ...]) -> Copy:
        """Begin to copy; see `Copy.wait` for the end of it."""
        if self._stream is None and len(outputs) == 1 and type(outputs[0]) is torch.Tensor and outputs[0].is_cpu:
            clone = outputs[0].detach().clone()  # by far the most frequent: a loss alone
            return Copy((clone,), clone.nbytes)
        nbytes = 0
        on_device: list[tuple[torch.Tensor, torch.Tensor]] = []

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal nbytes
            nbytes += tensor.nbytes
            clone = tensor.detach().clone()
            if clone.device.type == "cpu":
                return clone
            if self._stream is None:  # an accelerator without streams of CUDA's kind: this waits for it
                return clone.to("cpu")
            host = torch.empty(clone.shape, dtype=clone.dtype, device="cpu", pin_memory=True)
            on_device.append((clone, host))
            return host

        copied = tuple([map_tensors(copy, output) for output in outputs])
        return Copy(copied, nbytes, self._to_host(on_device) if on_device else None)

    def of_step(self, copies: list[Copy], shared: bool = False) -> StepOutputs:
        """The outputs of one step, to go beside its event. ``shared``: more than one will have them."""
        return StepOutputs(copies, self._notice, self._collating, shared)

    def _to_host(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for clone, host in pairs:
                host.copy_(clone, non_blocking=True)
                clone.record_stream(self._stream)  # its memory is not handed on before the copy has happened
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return arrived


# Thousands of these wait for a slow observer, and never in a cycle: with `gc=False` the collector does not walk them.
class Copy(msgspec.Struct, gc=False):
    """The outputs of one micro-batch: host tensors that may not be filled yet."""

    values: tuple[Any, ...]
    nbytes: int
    arrived: torch.cuda.Event | None = None
    """Happens when the last of those that come from a device is there; None if none does."""

    def wait(self) -> tuple[Any, ...]:
        """The values, filled; waits for the copy, so never call it on the loop's thread."""
        if self.arrived is not None:
            self.arrived.synchronize()  # WAIT: for the device, on an observer's thread
        return self.values


class StepOutputs(msgspec.Struct, gc=False):
    """The outputs of one optimizer step's micro-batches, shared by the callbacks that want them."""

    copies: list[Copy]
    notice: Notice
    lock: threading.Lock
    """Shared by all steps: two observers seldom collate at once."""
    shared: bool = False
    result: tuple[Any, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return sum([copy.nbytes for copy in self.copies])

    def of_one_batch(self) -> tuple[torch.Tensor, ...] | None:
        """The values, if they are tensors of one micro-batch that are here, and nobody has collated them."""
        copies = self.copies
        if len(copies) != 1 or copies[0].arrived is not None:
            return None
        values = copies[0].values
        for value in values:
            if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_nested:
                return None
        return values

    def collated(self) -> tuple[Any, ...]:
        """One value per output position; computed once, on the first observer's thread that asks.

        Whoever asks may change what they get: where it is shared, everybody has tensors of their own.
        """
        with self.lock:
            if self.result is None:
                self.result = collate_outputs([copy.wait() for copy in self.copies], self.notice)
                self.copies = []
        return _clones(self.result) if self.shared else self.result


_SMALL_BYTES = 4_096


def collate_steps(batch: Sequence[Published]) -> dict[int, tuple[torch.Tensor, ...]]:
    """As `StepOutputs.collated` for many steps; by their place in the batch.

    The numbers of all steps are stacked in one call. Each call of torch's releases the interpreter lock, which the loop
    takes and releases in its own calls: with some calls per step, both threads would wait for each other at each.

    Returns:
        The outputs of those steps that had one micro-batch and returned tensors. The others take the long way, and so
        do those of which everybody gets copies that are not small: a batch has no second copy of its memory.
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
    """The outputs of an epoch's steps, kept because a hook wants them at its end. Filled on the loop's thread.

    Args:
        on_too_large: Told when they outgrow their limit; if it does not raise, they are let go, and so is what comes.
            None: that is an error.
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
        self._collated: tuple[Any, ...] | None = None
        self.shared = False
        """Whether more than one will have them; known when the epoch is over."""

    def append(self, copy: Copy) -> None:
        """Keep one step's outputs. Takes as long for the last step as for the first.

        Raises:
            EpochOutputsTooLarge: the epoch's outputs have outgrown their limit, and somebody must have them.
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
        """What is kept by now, for a checkpoint: the returned function may be called much later, on another thread."""
        collector, last = self._collector, self._last
        kept = collector.kept() if collector is not None else None

        def make() -> Part:
            if last is not None:
                last.wait()  # the copies before it went through the same stream
            return part_of(kept() if kept is not None else None)

        return make

    def restore(self, kept: Any) -> None:
        """Go on with what stands in a checkpoint."""
        if self._collector is not None and kept is not None:
            self._collector.restore(kept)

    @property
    def nbytes(self) -> int:
        """Bytes kept so far."""
        return self._collector.nbytes if self._collector is not None else 0

    def collated(self) -> tuple[Any, ...]:
        """As `StepOutputs.collated`."""
        with self._lock:
            if self._collated is None:
                if self._last is not None:
                    self._last.wait()  # the copies before it went through the same stream
                    self._last = None
                self._collated = self._collector.collate(self._notice) if self._collector is not None else ()
        return _clones(self._collated) if self.shared else self._collated


def _clones(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([map_tensors(torch.clone, output) for output in outputs])
