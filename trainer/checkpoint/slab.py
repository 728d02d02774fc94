"""Host memory for copies of the state: mapped once, faulted in beforehand, and reused."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from events.bus.cpu_time import CpuTime
from events.log import in_this_run, logger

_CHUNK = 64 * 2**20  # bytes per fault-in, so that other threads' memory management does not wait
_ALIGNMENT = 2 * 2**20  # a huge page


class Slab:
    """A block of page-aligned memory, pinned for a CUDA device and not inherited by forked children.

    A forked dataloader worker would share its pages, and the next copy would fault on each one (14 times slower,
    measured). Pages are huge where the system supports that, which makes faulting them in many times faster.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: mmap.mmap | None = None
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        """Its memory: uint8 ``(nbytes,)``."""
        self._unpin: Callable[[], object] | None = None
        self.prefault_s: float | None = None
        """Seconds of its preparation; None once an event has reported them."""

    @property
    def nbytes(self) -> int:
        return self.bytes.numel()

    @property
    def view(self) -> memoryview:
        """Its memory, for writing to a file."""
        assert self._memory is not None
        return memoryview(self._memory)

    def reserve(self, nbytes: int) -> float:
        """Grow to at least ``nbytes``, which loses the content; return the seconds of that.

        Raises:
            MemoryError: The system has not enough memory.
        """
        if nbytes <= self.nbytes:
            return 0.0
        began = time.perf_counter()
        self.close()
        length = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        try:
            memory = _map(length)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"{length:,} bytes of memory for a checkpoint cannot be had: {error}") from error
        _live.add(memory)
        self._memory = memory
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        address = self.bytes.data_ptr()
        for begin in range(0, length, _CHUNK):
            # Releases the interpreter lock. Not with torch: a thread in its code at the exit aborts the process.
            ctypes.memset(address + begin, 0, min(_CHUNK, length - begin))
        if self._device.type == "cuda":
            self._pin()
        return time.perf_counter() - began

    def close(self) -> None:
        """Release the memory, which is unmapped with its last view."""
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()
        self._memory = None

    def _pin(self) -> None:
        """Pin the memory, so that the device copies to it asynchronously."""
        address = self.bytes.data_ptr()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            status = runtime.cudaHostRegister(address, self.nbytes, 0)
        if int(status) != 0:
            logger.warning(f"memory for checkpoints cannot be pinned (CUDA error {int(status)}); saves will be slow")
            return
        finalizer = weakref.finalize(self, runtime.cudaHostUnregister, address)
        finalizer.atexit = False
        self._unpin = finalizer


def _map(length: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, length)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # a kernel without it
                memory.madvise(getattr(mmap, advice))
    return memory


_live: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def _keep_in_child() -> None:
    # The child has not got the memory, and something else may be mapped there by now, which unmapping would take away.
    for memory in list(_live):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_in_child)


class SlabPool:
    """The slabs of a run, at most two. A slab is taken, written to the disk, and returned before its next use.

    Args:
        device: Of the run.
    """

    SLABS = 2

    def __init__(self, device: torch.device, cpu_time: CpuTime) -> None:
        self._device = device
        self._cpu_time = cpu_time
        self._free: list[Slab] = []
        self._made = 0
        self._changed = threading.Condition()
        self._preparing = False

    def prepare(self, nbytes: int) -> None:
        """Prepare a further slab on a thread, unless there are `SLABS`. Does not wait."""
        with self._changed:
            if self._preparing or self._made >= self.SLABS:
                return
            self._preparing = True
            self._made += 1
        slab = Slab(self._device)
        prepare = in_this_run(self._prepare)
        try:
            threading.Thread(target=prepare, args=(slab, nbytes), name="stagecast-slab", daemon=True).start()
        except RuntimeError:  # the system has no more threads: it is prepared when it is taken
            self._prepared(slab)

    def _prepare(self, slab: Slab, nbytes: int) -> None:
        try:
            with self._cpu_time.counting():
                slab.prefault_s = slab.reserve(nbytes)
        except MemoryError as error:  # a thread's border: met again, and reported, by the save that needs it
            logger.warning(f"{error}; a checkpoint may fail")
        finally:
            self._prepared(slab)

    def _prepared(self, slab: Slab) -> None:
        with self._changed:
            self._preparing = False
            self._free.append(slab)
            self._changed.notify_all()

    def take(self, timeout_s: float) -> Slab | None:
        """Take a free slab, whose memory may still have to grow; None if all are being written.

        Args:
            timeout_s: Maximum seconds to wait for a write. The preparation of a slab is waited for without a timeout.
        """
        with self._changed:
            if not self._free and not self._preparing and self._made < self.SLABS:
                self._made += 1
                return Slab(self._device)
            deadline = time.monotonic() + timeout_s
            while not self._free:
                left_s = deadline - time.monotonic()
                if left_s <= 0 and not self._preparing:
                    return None
                self._changed.wait(0.1 if left_s <= 0 else min(left_s, 0.1))
            return self._free.pop()

    def give_back(self, slab: Slab) -> None:
        """Return a slab. Any thread."""
        with self._changed:
            self._free.append(slab)
            self._changed.notify_all()
