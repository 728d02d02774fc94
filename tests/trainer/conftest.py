"""A small module to train, a callback that writes down its hooks, and ways to run them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from events.journal.reader import JournalReader
from events.messages import Event
from events.protocol import RunResult
from events.run.run import Run
from sinks import Memory
from trainer import CallbackInterface, ModuleInterface, Trainer, TrainerArguments
from trainer.checkpoint.slab import SlabPool

ROOT = Path(trainer.__file__).parent.parent
WAIT_S = 20.0
"""How long anything that ought to happen may take on a busy machine before the test gives up."""


class Net(ModuleInterface):
    """A linear regression over a few rows, which come in order and in lists: no torch dataloader."""

    def __init__(self, rows: int = 16, lr: float = 0.05) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=generator)
        self.lr = lr
        self.linear = nn.Linear(4, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(1, 4, generator=generator))
            self.linear.bias.zero_()

    def batches(self, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        starts = range(0, len(self.x), batch_size)
        return [(self.x[i : i + batch_size], self.y[i : i + batch_size]) for i in starts]

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.told = (steps, epochs)
        return [torch.optim.SGD(self.parameters(), lr=self.lr)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.batches(batch_size)

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return self.batches(batch_size)

    def forward_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        predicted = self.linear(x)
        return nn.functional.mse_loss(predicted, y), predicted

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss(batch)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss(batch)


class Diary(CallbackInterface):
    """Writes down every hook: ``(name, global_step, arguments)``; and on which thread it ran."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, Any]] = []
        self.threads: set[str] = set()

    def _write(self, name: str, global_step: int, rest: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.lines.append((name, global_step, rest))

    def of(self, name: str) -> list[tuple[int, Any]]:
        return [(step, rest) for line, step, rest in self.lines if line == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.lines]

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        self._write("on_begin_train_epoch", global_step, epoch)

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self._write("on_end_train_step", global_step, outputs)

    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self._write("on_end_train_epoch", global_step, outputs)

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self._write("on_end_val_epoch", global_step, (outputs, key))

    def on_end_train(self, global_step: int) -> None:
        self._write("on_end_train", global_step, None)


class InlineDiary(Diary):
    """One that also writes down the hook that runs on the loop's thread, and so at any place among the others."""

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        self._write("on_end_backward", global_step, loss_tensor.detach().clone())


class Outcome:
    """How a run ended, and what it published."""

    def __init__(self, result: RunResult | None, error: BaseException | None, memory: Memory) -> None:
        self._result = result
        self.error = error
        self.events = memory.events

    @property
    def result(self) -> RunResult:
        """Also of a run that a signal stopped, whose exception holds it."""
        if self._result is None:
            assert self.error is not None
            raise self.error
        return self._result

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]

    def names(self, *without: type[Event]) -> list[str]:
        return [type(event).__name__ for event in self.events if type(event) not in without]


_OWN = ("journal", "run_id", "run_dir", "checkpoints", "resume", "sinks_in", "config", "init_from")


def make_trainer(module: ModuleInterface, *, callbacks: Iterable[Any] = (), sinks: Any = (), **options: Any) -> Trainer:
    """A trainer on the CPU that writes nothing and takes no checkpoints, unless the ``options`` say so."""
    own = {name: options.pop(name) for name in _OWN if name in options}
    arguments = TrainerArguments(**({"train_batch_size": 8, "device": "cpu"} | options))
    return Trainer(
        module, arguments, callbacks=callbacks, sinks=sinks, **({"journal": False, "checkpoints": False} | own)
    )


def train(module: ModuleInterface, *, sinks: Iterable[Any] = (), **options: Any) -> Outcome:
    """Train to the end, however it ends, and keep all events."""
    memory = Memory()
    ready = make_trainer(module, sinks=[memory, *sinks], **options)
    try:
        result, error = ready.train(), None
    except BaseException as caught:
        result, error = getattr(caught, "result", None), caught
    return Outcome(result, error, memory)


def wait_until_in(thread: threading.Thread, place: str) -> None:
    """Until a thread is in a function of this name: what it waits from now on is that wait."""
    deadline = time.monotonic() + WAIT_S
    while True:
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None and frame.f_code.co_name != place:
            frame = frame.f_back
        if frame is not None:
            return
        assert time.monotonic() < deadline, f"{thread.name} has not come to {place}"
        threading.Event().wait(0.001)


def wait_until_failed(run: Run) -> None:
    """On the loop's thread, within a step or a hook: go on when the run is cancelled or an observer has failed fatally.

    Without this, how many steps are still taken until the loop hears of it would be a matter of luck.
    """
    control = run._connection._session.control  # type: ignore[attr-defined]
    deadline = time.monotonic() + WAIT_S
    while control.error is None:
        assert time.monotonic() < deadline, "nothing has failed"
        control.wait(1.0)


def trainer_threads(*, loops: bool = False) -> list[str]:
    """Names of the threads of runs that are alive; ``loops``: only those that train."""
    return [thread.name for thread in _threads("stagecast-loop-" if loops else "stagecast-")]


def _threads(prefix: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]


def join_threads() -> None:
    """Wait until no thread of a run is left: they end on their own, shortly after their run."""
    gc.collect()  # here: a thread on which the garbage of earlier tests were collected would be waited for, too
    deadline = time.monotonic() + WAIT_S
    while left := _threads("stagecast-"):  # asked again and again: one that ends may have started another just now
        left[0].join(deadline - time.monotonic())
        assert time.monotonic() < deadline, "\n".join(f"{one.name} is alive:\n{_stack(one)}" for one in left)


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "it has ended meanwhile"


def read_journal(run_dir: str | os.PathLike[str]) -> list[Event]:
    """Everything that stands in a run's journal."""
    reader = JournalReader(Path(run_dir) / "journal")
    events: list[Event] = []
    while batch := reader.read(10_000):
        events += batch
    assert not list(reader.skipped)
    return events


READS = {
    *("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__complex__"),
    *("__repr__", "__str__", "__format__", "__contains__", "__iter__", "is_nonzero", "equal", "allclose", "nonzero"),
}
aten = torch.ops.aten
OPERATORS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select}


class Calls(TorchFunctionMode):
    """What this thread calls from Python that gives a number to the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """The operators underneath that give a number to the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in OPERATORS:
            self.found.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching_reads(found: list[str]) -> Iterator[None]:
    """Notes all that this thread reads from tensors: from Python, then underneath."""
    with Operators(found), Calls(found):
        yield


class Script:
    """A Python program in a process of its own, which reports to us line by line."""

    def __init__(self, text: str, folder: Path) -> None:
        path = folder / "script.py"
        path.write_text(text)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,  # open until the end: a program may wait for it
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line: str) -> None:
        """Read until the program has printed this line."""
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            if printed.strip() == line:
                return
        raise AssertionError(f"the program ended without saying {line!r}:\n{self.process.communicate()[1]}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, the rest of its output, its errors."""
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err


@pytest.fixture
def kit() -> Any:
    """What the tests of this folder share, by name."""
    return SimpleNamespace(
        Net=Net,
        Diary=Diary,
        InlineDiary=InlineDiary,
        Memory=Memory,
        WAIT_S=WAIT_S,
        ROOT=ROOT,
        SlabPool=SlabPool,
        Trainer=Trainer,
        make_trainer=make_trainer,
        train=train,
        wait_until_failed=wait_until_failed,
        wait_until_in=wait_until_in,
        watching_reads=watching_reads,
        trainer_threads=trainer_threads,
        join_threads=join_threads,
        read_journal=read_journal,
        replace=msgspec.structs.replace,
    )


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Start a program; it is killed when the test ends."""
    started: list[Script] = []

    def start(text: str) -> Script:
        started.append(Script(text, tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        for pipe in (
            one.process.stdin,
            one.process.stdout,
            one.process.stderr,
        ):  # a forked child may hold the other end
            with contextlib.suppress(OSError):
                pipe.close()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_starts: None) -> None:
    """A run that writes into the working directory writes into the test's."""
    monkeypatch.chdir(tmp_path)


Start = Callable[[str], Script]
