"""Takes what a step returned off the loop's thread: detached copies in host memory, collated by whoever needs them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from trainer.collate import Notice, OutputCollector, collate_outputs
from trainer.data import map_tensors


class Capture:
    """Copies step outputs to the host. Used on the loop's thread; waits for nothing.

    On CUDA the tensors are cloned on the compute stream, where they cannot change any more, and copied to pinned
    memory on
    a stream of their own. On the CPU they are cloned too: the user's code may write to them in its next step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self, outputs: tuple[Any, ...]) -> Copy:
        """Begin to copy; see `Copy.wait` for the end of it."""
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
            host = torch.empty(clone.shape, dtype=clone.dtype, pin_memory=True)
            on_device.append((clone, host))
            return host

        copied = tuple(map_tensors(copy, output) for output in outputs)
        return Copy(copied, self._to_host(on_device) if on_device else None, nbytes)

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


class Copy:
    """The outputs of one step: host tensors that may not be filled yet."""

    __slots__ = ("_arrived", "nbytes", "values")

    def __init__(self, values: tuple[Any, ...], arrived: torch.cuda.Event | None, nbytes: int) -> None:
        self.values = values
        self.nbytes = nbytes
        self._arrived = arrived

    def wait(self) -> tuple[Any, ...]:
        """The values, filled; waits for the copy, so never call it on the loop's thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self.values


class StepOutputs:
    """The outputs of one optimizer step's micro-batches, shared by the callbacks that want them."""

    __slots__ = ("_collated", "_copies", "_lock", "_notice")

    def __init__(self, copies: Sequence[Copy], notice: Notice) -> None:
        self._copies = copies
        self._notice = notice
        self._lock = threading.Lock()
        self._collated: tuple[Any, ...] | None = None

    def collated(self) -> tuple[Any, ...]:
        """One value per output position; computed once, on the first observer's thread that asks."""
        with self._lock:
            if self._collated is None:
                self._collated = collate_outputs([copy.wait() for copy in self._copies], self._notice)
                self._copies = ()
            return self._collated


class EpochOutputs:
    """The outputs of an epoch's steps, kept because a hook wants them at its end. Filled on the loop's thread."""

    def __init__(self, limit_bytes: int, owner: str, notice: Notice) -> None:
        self._collector = OutputCollector(limit_bytes, owner)
        self._notice = notice
        self._lock = threading.Lock()
        self._last: Copy | None = None
        self._collated: tuple[Any, ...] | None = None

    def append(self, copy: Copy) -> None:
        """Keep one step's outputs. Takes as long for the last step as for the first.

        Raises:
            EpochOutputsTooLarge: the epoch's outputs have outgrown their limit.
        """
        self._collector.append(copy.values)
        self._last = copy

    @property
    def nbytes(self) -> int:
        """Bytes kept so far."""
        return self._collector.nbytes

    def collated(self) -> tuple[Any, ...]:
        """One value per output position; computed once, on the first observer's thread that asks."""
        with self._lock:
            if self._collated is None:
                if self._last is not None:
                    self._last.wait()  # the copies before it went through the same stream
                    self._last = None
                self._collated = self._collector.collate(self._notice)
            return self._collated
