"""What the benchmarks of checkpoints share: the state that is saved, everyone who saves it, and the disk.

A peer is built with the state and a folder of its own. ``save(step)`` returns when the loop may go on, ``wait()`` when
the save is durable: its bytes fsynced, its final name in place. What a peer calls done is taken at its word, in its
favour: none of the peers fsyncs the folder, torch.save writes under the final name from the beginning, and DCP
fsyncs ``.metadata`` before Python has written it out.

`Ours` is made of the trainer's own parts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import mmap
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor as dcp_process
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from events.bus.backlog import Payload
from events.bus.cpu_time import CpuTime
from events.checkpoint import disk as checkpoint_disk
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.snapshot import Snapshot
from events.checkpoint.store import CheckpointStore
from events.messages import CheckpointFailed, CheckpointSaved, CheckpointStaged, Event
from events.origin import Origin
from sinks.checkpoints.writer import CheckpointWriter
from trainer.checkpoint.slab import Slab, SlabPool
from trainer.checkpoint.staging import Stager
from trainer.data.tensor_state import Collected

# Both say that this is one process without a GPU.
warnings.filterwarnings("ignore", message="Ignoring pin_memory flag")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
# DCP's process, which imports this module too, tells each of its steps on stderr.
logging.disable(logging.INFO)


# ---------------------------------------------------------------------------------------------------------------------
# The state


@dataclass(frozen=True)
class State:
    """A model and its Adam: as nested dictionaries, and the same tensors in a row."""

    tree: dict[str, Any]
    tensors: list[torch.Tensor]
    nbytes: int

    def update(self) -> None:
        """As the optimizer does between two saves: every tensor changes in place."""
        torch._foreach_add_(self.tensors, 1e-3)

    def describe(self) -> str:
        return f"state: {self.nbytes / 1e9:.2f} GB in {len(self.tensors)} tensors"


def adam_state(gigabytes: float) -> State:
    """A transformer's parameters, both their moments and their step counters.

    216 tensors (54 parameters), or 468 (117 parameters) from 1.5 GB on. Its width follows from the size.
    """
    parameters = 54 if gigabytes < 1.5 else 117
    elements = int(gigabytes * 1e9) // 12  # float32, three times
    width = 8
    while sum(map(_numel, _layers(width + 8, parameters - 1))) <= 0.85 * elements:
        width += 8
    shapes = _layers(width, parameters - 1)
    vocabulary = max(1, (elements - sum(map(_numel, shapes))) // width)
    generator = torch.Generator().manual_seed(0)
    model: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    tensors: list[torch.Tensor] = []
    for index, shape in enumerate([(vocabulary, width), *shapes]):
        name = f"layers.{index}.weight"
        model[name] = torch.empty(shape).uniform_(generator=generator)
        optimizer[name] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.empty(shape).uniform_(generator=generator),
            "exp_avg_sq": torch.empty(shape).uniform_(generator=generator),
        }
        tensors += [model[name], *optimizer[name].values()]
    return State({"model": model, "optimizer": optimizer}, tensors, sum(tensor.nbytes for tensor in tensors))


def _layers(width: int, parameters: int) -> list[tuple[int, ...]]:
    """The shapes of so many parameters, layer by layer."""
    d = width
    attention = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    layer = [*attention, (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [layer[index % len(layer)] for index in range(parameters)]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# ---------------------------------------------------------------------------------------------------------------------
# The peers


class Peer:
    """One way to save. ``future`` is the save in flight, for those that have one."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state = state
        self.folder = folder
        self.future: Future[Any] | None = None

    def save(self, step: int) -> None:
        """Returns when the loop may go on and change the state. Waits for the save before this one, where it must."""
        raise NotImplementedError

    def wait(self) -> None:
        """Returns when the last save is durable; raises what it failed with."""
        if self.future is not None:
            self.future.result()
            self.future = None

    def busy(self) -> bool:
        """Whether a save is still on its way."""
        return self.future is not None and not self.future.done()

    def clean(self) -> None:
        """Removes what was saved, for the next save to find the same disk."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def close(self) -> None:
        """Waits, and gives threads, processes and memory back."""
        self.wait()


def unforked(nbytes: int) -> torch.Tensor:
    """So many bytes, faulted in, which a forked child does not get (else every copy after a fork faults again)."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()


class Memcpy(Peer):
    """The floor: the state's tensors into prepared ones, with one thread. Durable never."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        flat = unforked(sum(_aligned(tensor.nbytes) for tensor in state.tensors))
        self.copies: list[torch.Tensor] = []
        offset = 0
        for tensor in state.tensors:
            part = flat[offset : offset + tensor.nbytes]
            self.copies.append(part.view(tensor.dtype).view(tensor.shape))
            offset += _aligned(tensor.nbytes)

    def save(self, step: int) -> None:
        torch._foreach_copy_(self.copies, self.state.tensors)


class PlainCopy(Peer):
    """As many bytes from one tensor into another, with one thread. Durable never."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.source, self.copy = unforked(state.nbytes), unforked(state.nbytes)

    def save(self, step: int) -> None:
        self.copy.copy_(self.source)


def _aligned(nbytes: int) -> int:
    return (nbytes + 63) // 64 * 64


def _torch_save(tree: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())


class TorchSave(Peer):
    """torch.save and fsync, in the loop."""

    def save(self, step: int) -> None:
        _torch_save(self.state.tree, self.folder / f"step-{step}.pt")


class CloneThread(Peer):
    """A clone of every tensor in the loop; torch.save and fsync in a thread."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.executor = ThreadPoolExecutor(1, "clone_thread")

    def save(self, step: int) -> None:
        self.wait()
        self.future = self.executor.submit(_torch_save, _cloned(self.state.tree), self.folder / f"step-{step}.pt")

    def close(self) -> None:
        super().close()
        self.executor.shutdown()


def _cloned(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _cloned(value) for key, value in tree.items()}
    return tree.clone()


class DcpThread(Peer):
    """torch.distributed.checkpoint.async_save, THREAD, with a stager that keeps its buffers."""

    checkpointer = AsyncCheckpointerType.THREAD
    shared = False

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        # Pinned memory, asynchronous staging and non-blocking copies want an accelerator. The buffers are kept by the
        # identity of the state's storages, so this same stager must be passed to every save.
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=self.shared, use_async_staging=False, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options)

    def save(self, step: int) -> None:
        self.wait()  # a save in flight writes from the stager's buffers, and async_save would overwrite them
        writer = dcp.FileSystemWriter(self.folder / f"step-{step}", sync_files=True)
        # A stager passed in also keeps the writer from staging by itself, which it does without kept buffers.
        future = dcp.async_save(
            self.state.tree,
            storage_writer=writer,
            async_checkpointer_type=self.checkpointer,
            async_stager=self.stager,
            no_dist=True,
        )
        assert isinstance(future, Future)
        self.future = future

    def close(self) -> None:
        super().close()
        self.stager.close()


class DcpProcess(DcpThread):
    """torch.distributed.checkpoint.async_save, PROCESS, with a stager that keeps its buffers in shared memory."""

    checkpointer = AsyncCheckpointerType.PROCESS
    shared = True

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        # The process is started by the first save. It asks for the rank, so there must be a group. It would find its
        # way by the machine's full name, which need not resolve; with the prefix store it uses ours.
        self.store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
        environment = {
            "DCP_USE_PREFIX_STORE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        dist.init_process_group("gloo", store=self.store, rank=0, world_size=1)

    def close(self) -> None:
        child: BaseProcess | None = None
        try:
            super().close()
        finally:
            if dcp_process._CHECKPOINT_PROCESS is not None:
                child = dcp_process._CHECKPOINT_PROCESS._save_process
                dcp_process._CHECKPOINT_PROCESS = None  # its finalizer ends the process
                child.join(10.0)
                if child.is_alive():
                    child.kill()
            dist.destroy_process_group()
            for name, value in self.before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class Ours(Peer):
    """The trainer's own parts, in the order in which a run uses them: snapshot, write, hash, commit, retention.

    ``hashed=False`` leaves the hash out. ``skip`` tells what becomes of a save when both slabs are in use: it is left
    out and counted, or waits.

    Attributes:
        prefault_s: Seconds that setting up the two slabs took, in the constructor.
        saved: How many saves became durable.
        skipped: How many were left out, because both slabs were in use.
    """

    def __init__(self, state: State, folder: Path, *, hashed: bool = True, skip: bool = False) -> None:
        super().__init__(state, folder)
        self.skipped = 0
        self._skip = skip
        self._events: list[Event] = []
        self._origin = Origin("benchmark")
        self._stager = Stager(torch.device("cpu"))
        self._pool = SlabPool(torch.device("cpu"), CpuTime())
        self._snapshots: list[Snapshot] = []
        self._hash = checkpoint_disk._hash
        if not hashed:
            checkpoint_disk._hash = lambda data: "0" * 32
        nbytes = self._stager.lay_out(Collected(state.tree))
        slabs = [Slab(torch.device("cpu")) for _ in range(SlabPool.SLABS)]
        self.prefault_s = sum(slab.reserve(nbytes) for slab in slabs)
        self._pool._made = SlabPool.SLABS
        for slab in slabs:
            self._pool.give_back(slab)
        self._writer = CheckpointWriter(
            CheckpointStore(folder),
            Checkpoints(keep_last=2),
            origin=self._origin,
            publish=self._events.append,
            sync_journal=lambda seq: None,
            weights=lambda: None,
            module="benchmark",
            versions={},
        )
        self._thread = ThreadPoolExecutor(1, "writer")

    @property
    def saved(self) -> int:
        return sum(isinstance(event, CheckpointSaved) for event in self._events)

    def save(self, step: int) -> None:
        slab = self._pool.take(0.0)
        while slab is None:
            if self._skip:
                self.skipped += 1
                return
            slab = self._pool.take(1.0)
        collected = Collected(self.state.tree)
        staged = self._stager.copy(collected, slab, ())
        snapshot = Snapshot(
            CheckpointName(step, 1),
            parent=None,
            metric=None,
            image=staged.image,
            nbytes=staged.nbytes,
            state=collected.state,
            parts={},
            owners={},
            wait=staged.wait,
            give_back=functools.partial(self._pool.give_back, slab),
        )
        self._snapshots = [one for one in self._snapshots if not one.released] + [snapshot]
        self._origin.global_step = step
        event = CheckpointStaged(*self._origin.header(), str(snapshot.name), ["steps"])
        self.future = self._thread.submit(self._write, event, snapshot)

    def _write(self, event: CheckpointStaged, snapshot: Snapshot) -> None:
        self._writer.deliver([(event, Payload(snapshot))])
        failed = [one.error for one in self._events if isinstance(one, CheckpointFailed)]
        if failed:
            raise RuntimeError(failed[0])

    def queued(self) -> int:
        """How many saves are held in memory now, with the one that is being written."""
        return sum(not snapshot.released for snapshot in self._snapshots)

    def close(self) -> None:
        super().close()
        self._thread.shutdown()
        checkpoint_disk._hash = self._hash


# What a row of a table is called, and how its peer is built.
PEERS: dict[str, tuple[str, Callable[[State, Path], Peer]]] = {
    "memcpy": ("memcpy, _foreach_copy_", Memcpy),
    "plain_copy": ("memcpy, one copy_", PlainCopy),
    "torch_save": ("torch.save, fsync", TorchSave),
    "clone_thread": ("clone, torch.save in a thread", CloneThread),
    "dcp_thread": ("DCP THREAD, cached stager", DcpThread),
    "dcp_process": ("DCP PROCESS, cached, shared", DcpProcess),
    "ours": ("ours", Ours),
    "ours_unhashed": ("ours, without the hash", functools.partial(Ours, hashed=False)),
}


# ---------------------------------------------------------------------------------------------------------------------
# The harness


def arguments(description: str | None, *, gigabytes: float = 0.51) -> argparse.ArgumentParser:
    """The options that all these benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=gigabytes, help="of state (default: %(default)s; also 3.07)")
    parser.add_argument("--dir", type=Path, default=Path(), help="a folder on the disk to write to (default: this one)")
    return parser


def add_only(parser: argparse.ArgumentParser) -> None:
    """Lets the peers be chosen."""
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("all", "peers", "ours", *PEERS),
        default=["all"],
        metavar="PEER",
        help=f"'all', 'peers' (all but ours), 'ours', or some of: {', '.join(PEERS)}",
    )


def chosen(only: list[str], *, without: tuple[str, ...] = ()) -> list[str]:
    """The peers that ``--only`` names, in the table's order."""
    return [
        name
        for name in PEERS
        if name not in without
        and ("all" in only or name in only or ("ours" if name.startswith("ours") else "peers") in only)
    ]


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A temporary folder in ``folder``, which must be on a disk; it goes also when the benchmark is terminated."""
    kind = filesystem(folder)
    if kind in ("tmpfs", "ramfs"):
        sys.exit(f"{folder.resolve()} is on a {kind}, which is memory: give a folder on a disk with --dir")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix=".checkpoint-benchmark-", dir=folder) as path:
        yield Path(path)


def filesystem(folder: Path) -> str:
    """The type of the file system that ``folder`` is on."""
    path = folder.resolve()
    found = (0, "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        mounted = Path(head.split()[4])
        if path.is_relative_to(mounted):
            found = max(found, (len(mounted.parts), tail.split()[0]))
    return found[1]


@contextlib.contextmanager
def opened(name: str, state: State, folder: Path) -> Iterator[tuple[Peer, float]]:
    """The peer, and the seconds it took to build."""
    place = folder / name
    place.mkdir()
    begin = clock()
    peer = PEERS[name][1](state, place)
    opened_s = clock() - begin
    try:
        yield peer, opened_s
    finally:
        peer.close()
        shutil.rmtree(place)
        settle(folder)


def settle(folder: Path) -> None:
    """Has the file system finish what removing files began, before the next save is measured."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def written_bytes(folder: Path) -> int:
    """How many bytes the files in ``folder`` have."""
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


def check_written(name: str, peer: Peer) -> None:
    """Who copies only has nothing to show; all others must have written the whole state."""
    if isinstance(peer, Memcpy | PlainCopy):
        return
    written = written_bytes(peer.folder)
    if written < peer.state.nbytes:
        raise RuntimeError(f"{name} wrote {written:,} bytes of a state of {peer.state.nbytes:,}")


@dataclass
class SlowWrites:
    """What `slow_writes` has seen."""

    writes: int = 0
    nbytes: int = 0
    in_flight: int = 0
    most_in_flight: int = 0


@contextlib.contextmanager
def slow_writes(seconds: float) -> Iterator[SlowWrites]:
    """A disk where each write takes ``seconds``, for whoever writes by ``os``.

    ``write``, ``pwrite``, ``writev`` and ``pwritev`` are replaced in the module, so the writer has to call them there
    (``os.pwrite(...)``, not a name imported from it). Pipes and sockets stay quick. The GIL is free during the wait, as
    in a true write. When the block is left the disk is quick again, also for the writes that are waiting.
    """
    seen, over = SlowWrites(), threading.Event()
    lock = threading.Lock()
    names = ("write", "pwrite", "writev", "pwritev")
    originals = {name: getattr(os, name) for name in names if hasattr(os, name)}

    def slow(original: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(original)
        def write(descriptor: int, *rest: Any) -> int:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return original(descriptor, *rest)
            with lock:
                seen.in_flight += 1
                seen.most_in_flight = max(seen.most_in_flight, seen.in_flight)
            over.wait(seconds)
            try:
                written = original(descriptor, *rest)
            finally:
                with lock:
                    seen.in_flight -= 1
            with lock:
                seen.writes += 1
                seen.nbytes += written
            return written

        return write

    for name, original in originals.items():
        setattr(os, name, slow(original))
    try:
        yield seen
    finally:
        over.set()
        for name, original in originals.items():
            setattr(os, name, original)


class PythonStep:
    """A training step that is mostly Python: many small tensor operations, calibrated to take ``target_s``.

    As in the small models that people debug with, each operation takes and gives back the GIL.
    """

    def __init__(self, target_s: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.empty(16, 16).uniform_(-1, 1, generator=generator)
        self.weight = torch.empty(16, 16).uniform_(-0.1, 0.1, generator=generator)
        self.repeats = 50
        for _ in range(3):  # the first estimate is made cold
            self.repeats = max(1, round(self.repeats * target_s / self._time()))
        self.step_s = self._time()

    def _time(self) -> float:
        times = []
        for _ in range(200):
            begin = clock()
            self()
            times.append(clock() - begin)
        return sorted(times)[len(times) // 2]

    def __call__(self) -> float:
        x, total = self.x, 0.0
        for index in range(self.repeats):
            x = torch.tanh(x @ self.weight).add_(self.x)
            total += sum([(index * n) % 7 for n in range(8)])
        return total
