"""Copies a run's state to host memory between two steps."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from events.checkpoint.disk import PAGE
from events.checkpoint.tensor_file import Layout, TensorInfo, lay_out
from trainer.checkpoint.slab import Slab
from trainer.data.tensor_state import BASE_DTYPES, Collected


class Staged:
    """A copy, pending or complete.

    Attributes:
        image: The tensor file, padded to a page's end.
        nbytes: Of the file.
    """

    def __init__(self, image: memoryview, nbytes: int, arrived: torch.cuda.Event | None) -> None:
        self.image = image
        self.nbytes = nbytes
        self._arrived = arrived

    def wait(self) -> None:
        """Wait until the copy is complete. Waits for the device: not for the loop's thread."""
        if self._arrived is not None:
            self._arrived.synchronize()  # WAIT: for the device, on the writer's thread


class Stager:
    """Copies the state of one run. Belongs to the loop's thread.

    On the CPU `copy` returns when the copy is complete. On CUDA the copy runs on its own stream, beside the next
    forward and backward; `gate` makes the device wait for it before its sources change. Only tensors that nothing but
    the optimizers changes are read so late; all others are cloned at once, on the compute stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._key: tuple[list[TensorInfo], dict[str, str]] | None = None
        self._layout = Layout(b"", [], 0)
        self._views: dict[int, tuple[Layout, list[torch.Tensor]]] = {}  # by slab
        self.pending: torch.cuda.Event | None = None
        """The copy for which the optimizers must wait; None without one."""

    def lay_out(self, collected: Collected) -> int:
        """Lay out the tensor file; return the bytes of memory that it needs."""
        key = collected.infos, collected.aliases
        if key != self._key:  # it rarely changes
            self._key, self._layout = key, lay_out(*key, collected.metadata)
        return -(-self._layout.nbytes // PAGE) * PAGE

    def copy(self, collected: Collected, slab: Slab, late: Container[int]) -> Staged:
        """Copy a state to a slab.

        Args:
            late: Addresses (``data_ptr``) of the tensors on the device that only the optimizers change.

        Raises:
            MemoryError: The slab cannot grow.
        """
        nbytes = self.lay_out(collected)
        views = self._views_of(slab, nbytes)
        with torch.no_grad():
            arrived = self._copy(views, collected.tensors, late)
        return Staged(slab.view[:nbytes], self._layout.nbytes, arrived)

    def gate(self) -> None:
        """Make the device wait for the copy before its next work, which may change the sources; the host does not."""
        if self.pending is not None:
            torch.cuda.current_stream(self._device).wait_event(self.pending)
            self.pending = None

    def release(self) -> None:
        """Drop the views of slabs."""
        self._views.clear()

    def _views_of(self, slab: Slab, nbytes: int) -> list[torch.Tensor]:
        layout, views = self._views.get(id(slab), (None, []))
        if layout is self._layout:
            return views
        views.clear()
        self._views.pop(id(slab), None)  # they would keep the slab's old memory
        slab.reserve(nbytes)
        assert self._key is not None
        infos, _ = self._key
        header = self._layout.header
        slab.bytes[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        slab.bytes[self._layout.nbytes : nbytes] = 0
        views = [
            slab.bytes[offset : offset + info.nbytes].view(BASE_DTYPES[info.dtype]).view(info.shape)
            if info.nbytes
            else torch.empty(info.shape, dtype=BASE_DTYPES[info.dtype], device="cpu")
            for info, offset in zip(infos, self._layout.offsets, strict=True)
        ]
        self._views[id(slab)] = self._layout, views
        return views

    def _copy(
        self, views: list[torch.Tensor], tensors: Iterable[torch.Tensor], late: Container[int]
    ) -> torch.cuda.Event | None:
        if self._stream is None:
            # On one thread: two are slower. Exists since torch 2.0.
            torch._foreach_copy_(views, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
            return None
        self.gate()
        sources: list[torch.Tensor] = []
        clones: list[torch.Tensor] = []
        for tensor in tensors:
            if tensor.device.type == "cuda" and tensor.data_ptr() not in late:
                clones.append(tensor.clone())
                tensor = clones[-1]
            sources.append(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for view, source in zip(views, sources, strict=True):
                # The host memory is pinned, so the host does not wait; a copy from the host is synchronous.
                view.copy_(source, non_blocking=source.device.type == "cuda")
            for clone in clones:
                clone.record_stream(self._stream)  # so that its memory is not reused before the copy
            arrived.record(self._stream)
        self.pending = arrived
        return arrived
