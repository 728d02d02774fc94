"""Samples the use of the machine, of this process and of its GPUs."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import torch

from events.bus.pump import Pump
from events.log import current_origin, logger
from events.messages import GpuSample, RunStarted, SystemSampled
from events.origin import Origin
from events.sink import Delivery

if TYPE_CHECKING:
    from psutil import Process  # type: ignore[import-untyped]

_FIRST_S = 1.0
"""Maximum seconds from the start to the first sample, so that a page shows values soon."""
_SHORTEST_S = 0.05
"""Minimum seconds per share or rate: processor times have a resolution of a hundredth of a second."""
_LAST_S = 1.0
"""Maximum seconds that the end of a run waits for its last sample."""
_LOOPBACK = ("lo", "lo0", "Loopback Pseudo-Interface 1")

T = TypeVar("T")


class SystemSampler:
    """Publishes `SystemSampled` from its own thread: soon after `RunStarted`, then regularly, and at the end.

    All methods are called in the run's event loop. A counter that cannot be read is None, with one warning. A counter
    that hangs, such as the disk usage of a dead network file system, ends the samples, but nothing waits for it.

    Args:
        interval_s: Seconds from one sample to the next.
        pump: Delivers `RunStarted`; its ring receives the samples.
        folder: The run folder; None without one.
    """

    def __init__(self, interval_s: float, pump: Pump, folder: str | None) -> None:
        self._interval_s = interval_s
        self._pump = pump
        self._ring = pump.ring
        # Here and not on the thread: workers that a dataloader forks during an import on another thread can never
        # import that module.
        self._machine = _Machine(importlib.import_module("psutil"), folder)
        self._nvml = _import_nvml()
        self._subscription = pump.subscribe("system", Delivery(types=frozenset({RunStarted})))
        self._began = anyio.Event()
        self._ended = anyio.Event()
        self._ending = threading.Event()
        self._abandoned = False
        self._thread: threading.Thread | None = None

    async def run(self) -> None:
        """Start the thread once the run has started, because `RunStarted` is the first event."""
        try:
            await self._subscription.receive()
            thread = threading.Thread(target=self._run, name="stagecast-system", daemon=True)
            thread.start()
            self._thread = thread
        except anyio.EndOfStream:
            pass  # the run never started
        except RuntimeError as error:
            logger.warning(f"the system is not sampled: {error}")  # the system has no more threads
        finally:
            self._subscription.discard()
            self._began.set()

    async def stop(self) -> None:
        """Take a last sample; waits for at most `_LAST_S`."""
        with anyio.move_on_after(_LAST_S):
            await self._pump.drain()
            if self._subscription.statistics.published:  # the run is over, but the thread may not have started yet
                await self._began.wait()
            self._ending.set()
            if self._thread is not None:
                await self._ended.wait()
        if self._thread is not None and not self._ended.is_set():
            logger.warning(f"the last sample of the system is skipped: reading {self._machine.reading} takes too long")
        self.abandon()

    def abandon(self) -> None:
        """Publish no further sample, and end after the current read."""
        self._abandoned = True
        self._ending.set()

    # ---------------------------------------------------------------------------------- on the sampler's thread

    def _run(self) -> None:
        current_origin.set(self._ring.origin)
        with self._ring.cpu_time.counting():
            try:
                self._sample()
            except Exception as error:  # the thread's border: a run continues without statistics
                logger.warning(f"the system is not sampled any more: {type(error).__name__}: {error}")
        self._ring.post(self._ended.set)

    def _sample(self) -> None:
        origin, machine = self._ring.origin, self._machine
        gpus = machine.try_read("the GPUs", lambda: _Gpus(self._nvml)) or _Gpus(None)
        with contextlib.closing(gpus):
            machine.read(origin)  # the baseline of the first rates
            wait_s = min(self._interval_s, _FIRST_S)
            while True:
                last = self._ending.wait(min(wait_s, threading.TIMEOUT_MAX))
                event = None if self._abandoned else machine.read(origin, machine.try_read("the GPUs", gpus.read))
                if event is None or self._abandoned:
                    return
                self._ring.publish(event)
                if last:
                    return
                wait_s = self._interval_s


class _Machine:
    """The counters of the machine and of this process; rates are since the previous read."""

    def __init__(self, psutil: ModuleType, folder: str | None) -> None:
        self.reading = "nothing"
        """Name of the counter that is being read."""
        self._psutil = psutil
        self._folder = folder
        self._process = self._psutil.Process()
        self._cores = self._psutil.cpu_count() or 1
        self._before: dict[str, tuple[float, float]] = {}  # each counter's last value, with its time
        self._warned: set[str] = set()

    def read(self, origin: Origin, gpus: list[GpuSample] | None = None) -> SystemSampled:
        """Return a sample of this moment."""
        busy = self._rate("cpu", self.try_read("the processors' times", self._busy_s))
        used_s, resident = self.try_read("this process's children", self._tree) or (None, None)
        used = self._rate("process", used_s)
        memory = self.try_read("the memory", self._psutil.virtual_memory)
        disk = self.try_read("the disks' counters", lambda: self._psutil.disk_io_counters(nowrap=False))
        received, sent = self.try_read("the network's counters", self._network) or (None, None)
        return SystemSampled(
            *origin.header(),
            cpu_percent=None if busy is None else min(100.0, 100.0 * busy / self._cores),
            process_cpu_percent=None if used is None else 100.0 * used,
            memory_used_bytes=None if memory is None else memory.total - memory.available,
            memory_total_bytes=None if memory is None else memory.total,
            process_memory_bytes=resident,
            disk_read_bytes_per_s=self._rate("read", disk and disk.read_bytes),
            disk_written_bytes_per_s=self._rate("written", disk and disk.write_bytes),
            network_received_bytes_per_s=self._rate("received", received),
            network_sent_bytes_per_s=self._rate("sent", sent),
            disk_used_percent=self.try_read("the disk usage of the run's folder", self._disk_used),
            gpus=gpus or [],
        )

    def try_read(self, what: str, read: Callable[[], T]) -> T | None:
        """Call a function; None if it fails, with a warning the first time."""
        self.reading = what
        try:
            return read()
        except Exception as error:  # of one counter: the others are still useful
            if what not in self._warned:
                self._warned.add(what)
                logger.warning(f"{what} cannot be read, and are skipped: {type(error).__name__}: {error}")
            return None

    def _rate(self, name: str, value: float | None) -> float | None:
        now = time.monotonic()
        began, before = self._before.get(name, (now, 0.0))
        if value is None or 0.0 < now - began < _SHORTEST_S:
            return None
        self._before[name] = now, value
        # A decrease: a device was removed, or a counter was reset.
        return (value - before) / (now - began) if now > began and value >= before else None

    def _busy_s(self) -> float:
        times = self._psutil.cpu_times()
        idle: float = times.idle + getattr(times, "iowait", 0.0)
        guests: float = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in `user` and `nice` already
        # Hundredths, as the system counts: the rest is rounding, and would turn a second without work into a decrease.
        return round(float(sum(times)) - idle - guests, 2)

    def _tree(self) -> tuple[float, int]:
        """Return processor seconds and resident bytes of this process and its children; seconds of ended ones too."""
        used_s, resident = 0.0, 0
        for process in [self._process, *self._children()]:
            with contextlib.suppress(self._psutil.NoSuchProcess, self._psutil.AccessDenied):  # it has ended
                times = process.cpu_times()
                used_s += times.user + times.system + times.children_user + times.children_system
                resident += process.memory_info().rss
        return round(used_s, 2), resident

    def _children(self) -> list[Process]:
        """Return all descendants of this process.

        psutil reads every process of the machine to find them, and during a busy training loop each read waits for the
        interpreter lock. Linux has lists of children.
        """
        if not os.path.exists(f"/proc/{self._process.pid}/task/{self._process.pid}/children"):
            return list(self._process.children(recursive=True))
        found, parents = [], [self._process.pid]
        while parents:
            for child in _forked_by(parents.pop()):
                with contextlib.suppress(self._psutil.NoSuchProcess):
                    found.append(self._psutil.Process(child))
                parents.append(child)
        return found

    def _network(self) -> tuple[int, int]:
        cards = self._psutil.net_io_counters(pernic=True, nowrap=False)
        counted = [counters for name, counters in cards.items() if name not in _LOOPBACK]
        return sum(one.bytes_recv for one in counted), sum(one.bytes_sent for one in counted)

    def _disk_used(self) -> float | None:
        return None if self._folder is None else float(self._psutil.disk_usage(self._folder).percent)


def _forked_by(pid: int) -> list[int]:
    """Return the children of all threads of a process, on Linux."""
    children = []
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                children += [int(child) for child in file.read().split()]
    return children


def _import_nvml() -> ModuleType | None:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


class _Gpus:
    """The NVIDIA GPUs that are visible to the run, in torch's numbering; none without a driver."""

    def __init__(self, nvml: ModuleType | None) -> None:
        self._nvml = nvml
        self._handles: list[object] = []
        self._by_torch = False
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            self._handles = self._from_environment(nvml)
        except nvml.NVMLError as error:
            self._nvml = None
            logger.debug(f"no GPUs are sampled: {error}")

    def read(self) -> list[GpuSample]:
        """Return a sample per GPU."""
        if self._nvml is None:
            return []
        # Only torch knows the numbering; an earlier query would initialize CUDA in this process.
        if not self._by_torch and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
            self._by_torch = True
            self._handles = self._from_torch() or self._handles
        return [self._sample(self._nvml, index, handle) for index, handle in enumerate(self._handles)]

    def close(self) -> None:
        """Close the driver."""
        if self._nvml is not None:
            self._ask("nvmlShutdown")

    def _sample(self, nvml: ModuleType, index: int, handle: object) -> GpuSample:
        name, rates = self._ask("nvmlDeviceGetName", handle), self._ask("nvmlDeviceGetUtilizationRates", handle)
        memory, milliwatts = self._ask("nvmlDeviceGetMemoryInfo", handle), self._ask("nvmlDeviceGetPowerUsage", handle)
        celsius = self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
        return GpuSample(
            index,
            _text(name) if name is not None else "",
            None if rates is None else float(rates.gpu),
            None if memory is None else int(memory.used),
            None if memory is None else int(memory.total),
            None if milliwatts is None else milliwatts / 1_000,
            None if celsius is None else float(celsius),
        )

    def _ask(self, function: str, *arguments: object) -> Any:
        """Query the driver; None for a value that this GPU, or a MIG part of one, does not have."""
        assert self._nvml is not None
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None

    def _from_torch(self) -> list[object]:
        handles: list[object] = []
        for number in range(torch.cuda.device_count()):
            uuid = getattr(torch.cuda.get_device_properties(number), "uuid", None)
            handle = self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
            handle = handle or self._ask("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")
            if handle is None:
                return []  # with a gap in the numbering, one GPU would have the name of another
            handles.append(handle)
        return handles

    def _from_environment(self, nvml: ModuleType) -> list[object]:
        """Return the GPUs of ``CUDA_VISIBLE_DEVICES`` up to the first missing one, as CUDA does."""
        everyone = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return everyone
        found = (self._find(entry.strip(), everyone) for entry in visible.split(","))
        return list(itertools.takewhile(lambda handle: handle is not None, found))

    def _find(self, entry: str, everyone: list[object]) -> object:
        if entry.isdecimal():
            return everyone[int(entry)] if int(entry) < len(everyone) else None
        if entry.startswith("MIG-"):
            return self._ask("nvmlDeviceGetHandleByUUID", entry)
        # A unique prefix of an identifier is enough.
        named = [one for one in everyone if entry and _text(self._ask("nvmlDeviceGetUUID", one)).startswith(entry)]
        return named[0] if len(named) == 1 else None


def _text(answer: object) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)  # bytes: older versions of the client
