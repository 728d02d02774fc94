"""A run whose whole state is a function of the step, and the border between it and the disk, where faults are put.

`Calls` replaces ``os`` in the modules that write checkpoints: all their changes of the disk pass through it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from support.threads import WAIT_S
from torch import nn

from events import safe_files
from events.checkpoint import disk, store
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.messages import CheckpointFailed, CheckpointSaved, Event
from events.sink import RunInfo
from sinks.checkpoints import writer as checkpoint_writer
from trainer import CallbackInterface, Checkpoints, ModuleInterface, Trainer, TrainerArguments
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.resume import load_from
from trainer.data.tensor_state import bytes_of

# ---------------------------------------------------------------------------------------------------------- the run


class Counting(ModuleInterface):
    """Parameters, momentum, buffers and batch norm statistics: every step changes all of them, in place."""

    def __init__(self, epoch_steps: int = 6) -> None:
        super().__init__()
        self.epoch_steps = epoch_steps
        self.weight = nn.Parameter(torch.arange(1500.0) % 251)
        self.bias = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(5)
        self.pattern: torch.Tensor
        self.register_buffer("pattern", torch.zeros(300, dtype=torch.int32))
        self.batch = torch.arange(20.0).reshape(4, 5)

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.125, momentum=0.5)
        return [self.optimizer], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return [self.batch] * self.epoch_steps

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return {}

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.pattern.add_(1)
        spread = self.norm(batch + self.pattern[0])
        return self.weight.sum() + self.bias.sum() + (spread * batch).sum()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return torch.tensor(float(global_step))  # each validation is worse than the one before

    def digest(self) -> str:
        return digest([self.state_dict(), self.optimizer.state_dict()])


class Tally(CallbackInterface):
    """A callback with a state, on its own thread: the number of steps that it has seen."""

    def __init__(self) -> None:
        self.steps = 0

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def digest(tree: object) -> str:
    """Hash all values in a tree of containers and tensors."""
    if isinstance(tree, torch.Tensor):
        tree = tree.dtype, tree.shape, xxhash.xxh3_128_hexdigest(bytes_of(tree.detach().contiguous()))
    elif isinstance(tree, dict):
        tree = [(key, digest(tree[key])) for key in sorted(tree, key=str)]
    elif isinstance(tree, list | tuple):
        tree = [digest(item) for item in tree]
    return xxhash.xxh3_128_hexdigest(repr(tree).encode())


class Reference:
    """The state after each step, by a loop without a trainer."""

    def __init__(self) -> None:
        self._module = Counting()
        self._optimizer = self._module.get_optimizers_schedulers(0, 0)[0][0]
        self._digests = [self._module.digest()]

    def __getitem__(self, step: int) -> str:
        while len(self._digests) <= step:
            self._optimizer.zero_grad()
            self._module.train_step(0, self._module.batch, None).backward()
            self._optimizer.step()
            self._digests.append(self._module.digest())
        return self._digests[step]


reference = Reference()


class Sight(NamedTuple):
    """What a reader finds among a run's checkpoints."""

    name: CheckpointName | None
    """The one to resume from, which is complete and holds the state of its step."""
    rejected: list[str]
    """Damaged ones that the reader tried before it."""


def look(run_dir: Path) -> Sight:
    """Read what a resumed run would start from, and compare it with the reference.

    Raises:
        AssertionError: it holds another state.
        CheckpointError: there are checkpoints, and none can be read.
    """
    rejected: list[str] = []
    loaded = load_from(CheckpointStore(run_dir / "checkpoints"), lambda name, error: rejected.append(name))
    return Sight(check(loaded) if loaded is not None else None, rejected)


def look_since(run_dir: Path, announced: str) -> CheckpointName:
    """Assert that a reader rejects nothing and finds the announced checkpoint or a newer one; return its name."""
    sight = look(run_dir)
    assert not sight.rejected
    assert sight.name is not None
    assert not sight.name < CheckpointName.parse(announced)
    return sight.name


def check(loaded: Loaded) -> CheckpointName:
    """Assert that a checkpoint holds the state of its step; return its name."""
    name = loaded.manifest.name
    assert loaded.state["global_step"] == name.step
    found = digest([loaded.state["module"], loaded.state["optimizers"][0]])
    assert found == reference[name.step], f"{name} does not hold the state after step {name.step}"
    states = [part["state"] for part in loaded.parts.values() if isinstance(part, dict) and "state" in part]
    assert all(state == {"steps": name.step} for state in states), f"{name} holds a callback's state of another step"
    return name


def names_in(run_dir: Path) -> list[str]:
    return [str(name) for name in CheckpointStore(run_dir / "checkpoints").names()]


def make_trainer(
    run_dir: Path,
    *,
    module: ModuleInterface | None = None,
    epochs: int = 1,
    drain_timeout_s: float = 30.0,
    val_interval_steps: int | None = None,
    callbacks: Sequence[Any] = (),
    sinks: Sequence[Any] = (),
    journal: bool = False,
    resume: str | None = None,
    **settings: Any,
) -> Trainer:
    """Build a trainer that takes a checkpoint after every second step; ``settings`` are those of `Checkpoints`."""
    own = {"every_steps": 2, "keep_last": 1, "when_busy": "wait", "at_end": False, "weights": False}
    return Trainer(
        module if module is not None else Counting(),
        TrainerArguments(
            epochs=epochs,
            train_batch_size=4,
            seed=1,
            device="cpu",
            drain_timeout_s=drain_timeout_s,
            val_interval_steps=val_interval_steps,
        ),
        callbacks=callbacks,
        sinks=list(sinks),
        journal=journal,
        run_id="run",
        run_dir=run_dir,
        resume=resume,
        checkpoints=Checkpoints(**(own | settings)),
    )


class Arrivals:
    """A sink that keeps the events in the order of their arrival, and lets a thread wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._arrived = threading.Condition()

    def open(self, run: RunInfo) -> Arrivals:
        return self

    def write(self, events: Sequence[Event]) -> None:
        with self._arrived:
            self.events += events
            self._arrived.notify_all()

    def close(self) -> None: ...

    def of(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in list(self.events) if isinstance(event, kinds)]

    def wait_for(self, kind: type[Event], count: int = 1) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.of(kind)) >= count, WAIT_S), f"no {kind.__name__} arrived"


# ------------------------------------------------------------------------------------------------------- the border

NAMES = ("open", "write", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir", "mkdir", "close", "listdir")
"""The calls of ``os`` that the writing modules make; ``replace`` counts as a ``rename``."""
READING = {"stat", "fstat", "lseek", "fspath", "strerror", "getpid", "cpu_count", "PathLike", "DirEntry", "scandir"}
"""Other calls that they may make. Each new one must be added to one of the two lists."""
FAILING: dict[int, frozenset[str]] = {
    # The calls that a disk refuses for each reason. A full disk still removes; a read-only disk still reads.
    errno.EIO: frozenset(NAMES),
    errno.ENOSPC: frozenset({"create", "write", "pwrite", "fsync", "rename", "mkdir"}),
    errno.EROFS: frozenset({"create", "write", "pwrite", "ftruncate", "rename", "unlink", "rmdir", "mkdir"}),
}
NEVER = 10**9


class Call(NamedTuple):
    """A call that was made."""

    name: str
    path: str
    """The first path, or the path that the descriptor was opened with. For ``announce``, the checkpoint's name."""
    to: str = ""
    flags: int = 0
    at: int = 0
    """The offset of written bytes; the new length of a truncated file."""
    data: bytes = b""

    @property
    def creates(self) -> bool:
        return self.name == "open" and bool(self.flags & os.O_CREAT)


def is_refused(code: int, call: Call) -> bool:
    """Whether a disk refuses a call for this reason."""
    return call.name in FAILING[code] or (call.creates and "create" in FAILING[code])


class Fault:
    """An error at one call at the border or, where it is ``lasting``, at all calls from there until it is healed.

    Args:
        at: Number of the call, from 0.
        code: The error number; None kills the process.
        afterwards: The call is made, and then fails. (Failing writes always do half of their work.)
        from_event: The count of calls starts once this number of checkpoints is announced.
    """

    def __init__(
        self, at: int, code: int | None, *, lasting: bool = False, afterwards: bool = False, from_event: int = 0
    ) -> None:
        self.at = at
        self.code = code
        self.lasting = lasting
        self.afterwards = afterwards
        self.from_event = from_event
        self.struck: list[Call] = []
        self.noticed = threading.Event()
        """Set when a call has failed."""
        self.healed = False

    def strikes(self, call: Call, number: int) -> bool:
        if self.healed or number < self.at or (not self.lasting and self.struck):
            return False
        if self.lasting and not is_refused(self.code or 0, call):
            return False
        self.struck.append(call)
        return True

    def strike(self, call: Call) -> None:
        if self.code is None:
            os.kill(os.getpid(), signal.SIGKILL)
        self.noticed.set()
        assert self.code is not None
        raise OSError(self.code, os.strerror(self.code), call.path)


class Calls:
    """Replaces ``os`` while it is entered: records the calls that succeed, and lets a `Fault` happen.

    Args:
        syncs: Whether fsync is made. It only takes time where no machine crashes.
        takes: The number of bytes of a write that the disk takes, given the number of bytes there are.
        before: Called before each call, on its thread.
        on_saved: Called on the writer's thread before a checkpoint is announced.
        on_failed: Called on the writer's thread before a failure is published.
    """

    def __init__(
        self,
        fault: Fault | None = None,
        *,
        syncs: bool = False,
        takes: Callable[[int], int] | None = None,
        before: Callable[[Call], None] = lambda call: None,
        on_saved: Callable[[str], None] = lambda name: None,
        on_failed: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.log: list[Call] = []
        """Calls in order, with an ``announce`` for each announced checkpoint."""
        self.made: list[Call] = []
        """All calls since the fault started to count, with those that failed."""
        self._fault = fault
        self._syncs = syncs
        self._takes = takes
        self._before = before
        self._on_saved = on_saved
        self.on_failed = on_failed
        self._paths: dict[int, str] = {}
        self._positions: dict[int, int] = {}
        self._announced = 0
        self._lock = threading.RLock()

    @property
    def announced(self) -> str:
        """The checkpoint that was announced last."""
        return [call.path for call in self.log if call.name == "announce"][-1]

    def __enter__(self) -> Calls:
        for module in _BORDER:
            module.os = self  # type: ignore[attr-defined]
        safe_files.os = _OfCheckpoints(self)  # type: ignore[attr-defined]
        checkpoint_writer.CheckpointSaved = self._saved  # type: ignore[misc, assignment]
        checkpoint_writer.CheckpointFailed = self._failed  # type: ignore[misc, assignment]
        return self

    def __exit__(self, *exception: object) -> None:
        for module in (*_BORDER, safe_files):
            module.os = os  # type: ignore[attr-defined]
        checkpoint_writer.CheckpointSaved = CheckpointSaved  # type: ignore[misc]
        checkpoint_writer.CheckpointFailed = CheckpointFailed  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "replace":
            name = "rename"
        if name not in NAMES:
            assert not callable(real) or name in READING, f"os.{name} is called, and not known to the tests"
            return real
        return lambda *args, **named: self._make(name, real, *args, **named)

    def _saved(self, *fields: Any, **named: Any) -> CheckpointSaved:
        event = CheckpointSaved(*fields, **named)
        self.log.append(Call("announce", event.checkpoint))
        self._announced += 1
        self._on_saved(event.checkpoint)
        return event

    def _failed(self, *fields: Any, **named: Any) -> CheckpointFailed:
        event = CheckpointFailed(*fields, **named)
        self.on_failed(event.checkpoint)
        return event

    def _make(self, name: str, real: Any, *args: Any, **named: Any) -> Any:
        call = self._describe(name, *args, within=named.get("dir_fd", named.get("src_dir_fd")))
        if name == "close":
            self._paths.pop(args[0], None)
        self._before(call)
        with self._lock:
            fault = self._fault
            if fault is not None and self._announced >= fault.from_event:
                self.made.append(call)
                if fault.strikes(call, len(self.made) - 1):
                    self._make_in_part(fault, call, real, *args, **named)
                    fault.strike(call)
            if name == "fsync" and not self._syncs:
                result = None
            elif self._takes is not None and name in ("write", "pwrite"):
                count = self._takes(len(args[1]))
                result = real(args[0], args[1][:count], *args[2:]) if count else 0
            else:
                result = real(*args, **named)
            self._record(call, result, args)
        return result

    def _make_in_part(self, fault: Fault, call: Call, real: Any, *args: Any, **named: Any) -> None:
        """Do the work that a failing call does before it fails."""
        if call.name in ("write", "pwrite"):
            fd, data, *at = args
            half = len(data) // 2 // disk.PAGE * disk.PAGE or len(data) // 2
            with contextlib.suppress(OSError):  # direct I/O takes complete pages
                done = real(fd, data[:half], *at)
                self._record(call._replace(data=bytes(data[:done])), done, (fd, data[:done], *at))
        elif call.name == "close":
            real(*args)
        elif fault.afterwards and fault.code is not None and call.name != "fsync":
            result = real(*args, **named)
            self._record(call, result, args)
            if call.name == "open":
                os.close(result)
                self._paths.pop(result)

    def _describe(self, name: str, *args: Any, within: int | None = None) -> Call:
        if name in ("write", "pwrite"):
            at = args[2] if name == "pwrite" else self._positions[args[0]]
            return Call(name, self._paths[args[0]], at=at, data=bytes(args[1]))
        if name == "ftruncate":
            return Call(name, self._paths[args[0]], at=args[1])
        if isinstance(args[0], int):
            return Call(name, self._path_of(args[0]))
        path = self._absolute(args[0], within)
        if name == "open":
            return Call(name, path, flags=args[1])
        return Call(name, path, to=self._absolute(args[1], within) if name == "rename" else "")

    def _absolute(self, path: Any, within: int | None) -> str:
        return os.path.abspath(path if within is None else f"{self._path_of(within)}/{path}")

    def _path_of(self, fd: int) -> str:
        """The path that a descriptor was opened with, here or in another module."""
        return self._paths[fd] if fd in self._paths else os.readlink(f"/proc/self/fd/{fd}")

    def concerns(self, name: str, *args: Any, **named: Any) -> bool:
        """Whether a call of a module that also writes other files belongs to checkpoints or weights."""
        if name == "listdir" or (name == "open" and not args[1] & os.O_CREAT):
            return False
        if isinstance(args[0], int):
            return args[0] in self._paths or (name == "fsync" and self._path_of(args[0]).endswith("/checkpoints"))
        path = self._absolute(args[0], named.get("dir_fd", named.get("src_dir_fd")))
        return "/checkpoints" in path or "weights.safetensors" in path

    def _record(self, call: Call, result: Any, args: Sequence[Any]) -> None:
        if call.name == "open":
            self._paths[result], self._positions[result] = call.path, 0
        elif call.name == "write":
            self._positions[args[0]] += result
        if call.name in ("write", "pwrite"):
            call = call._replace(data=call.data[:result])
        self.log.append(call)


class _OfCheckpoints:
    """Replaces ``os`` in a module that also writes other files: `Calls` gets the calls that concern checkpoints."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in NAMES and name != "replace":
            return real
        recorded, concerns = getattr(self._calls, name), self._calls.concerns
        return lambda *args, **named: (recorded if concerns(name, *args, **named) else real)(*args, **named)


_BORDER = (disk, store, checkpoint_writer)


def calls_of(run_dir: Path, from_event: int = 0, **options: Any) -> list[Call]:
    """The calls that a run makes without a fault, from the announcement of this number of checkpoints on."""
    with Calls(Fault(NEVER, None, from_event=from_event)) as calls:
        make_trainer(run_dir, **options).train()
    return calls.made


@contextlib.contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """Assert that the block leaves no file open."""
    before = _descriptors()
    yield
    for thread in threading.enumerate():
        if thread.name == "stagecast-git":  # a run that fails at its start does not wait for it
            thread.join()
    assert _descriptors() == before


def _descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in found if path.startswith("/") and not path.startswith(("/proc", "/dev")))


def leftovers(run_dir: Path) -> list[str]:
    """Temporary files and folders among a run's checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("."))
