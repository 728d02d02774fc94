"""Factories of trainers for `test_launch`, called in other processes."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from support.training import Net
from torch.utils.data import DataLoader, TensorDataset

from trainer import Checkpoints, Trainer, TrainerArguments


class Diverged(Exception):
    """An error of the user's."""


class Job(Net):
    """A module that does something at a step, and may read its rows in workers."""

    def __init__(self, deed: str = "", at: int = 5, workers: int = 0, step_s: float = 0.0) -> None:
        super().__init__(lr=0.01, act=lambda step: self.reach(step))
        self.deed, self.at, self.workers, self.step_s = deed, at, workers, step_s

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        data, workers = TensorDataset(self.x, self.y), self.workers
        return DataLoader(data, batch_size, sampler=sampler(data), num_workers=workers, persistent_workers=workers > 0)

    def reach(self, step: int) -> None:
        time.sleep(self.step_s)
        if step == self.at and self.deed:
            getattr(self, self.deed)()

    def fail(self) -> None:
        print("about to fail")
        raise Diverged("it was höher") from ValueError("the cause")

    def leave(self) -> None:
        sys.exit(3)

    def vanish(self) -> None:
        print("about to vanish")
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])  # outlives its parent
        os._exit(7)

    def segfault(self) -> None:
        print("about to crash")
        ctypes.string_at(0)

    def hold_interpreter(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # one would end the sleep
        (Path.cwd() / "held").touch()
        ctypes.PyDLL(None).sleep(100)  # type: ignore[attr-defined]  # unlike CDLL, it keeps the interpreter lock

    def chatter(self) -> None:
        for _ in range(80):
            print("x" * 2**20)
        self.deed, self.at = "say_more", self.at + 1

    def say_more(self) -> None:
        self.at += 1
        print("more", flush=True)

    def linger(self) -> None:
        threading.Thread(target=time.sleep, args=(100,), daemon=False).start()  # the interpreter's end waits for it


def build(
    epochs: int = 2, stop_grace_s: float = 20.0, every_steps: int | None = None, config: Any = None, **options: Any
) -> Trainer:
    """Build a trainer for epochs of two steps."""
    arguments = TrainerArguments(epochs=epochs, train_batch_size=8, device="cpu", stop_grace_s=stop_grace_s)
    return Trainer(Job(**options), arguments, checkpoints=Checkpoints(every_steps=every_steps), config=config)


def build_with(run_dir: str, journal: bool = True) -> Trainer:
    """Build a trainer with a folder of its own choice."""
    arguments = TrainerArguments(epochs=1, train_batch_size=8, device="cpu")
    return Trainer(Job(), arguments, run_id="mine", run_dir=run_dir, journal=journal, checkpoints=False)


def build_checked(nan: float, data: bytes, nested: dict[str, list[Any]], epochs: int) -> Trainer:
    """Check values of all kinds."""
    assert math.isnan(nan), nan
    assert data == b"\0\xff", data
    assert nested == {"a": [1, None, math.inf, True, "ü"]}, nested
    print("built")
    return build(epochs=epochs, step_s=0.001, config={"epochs": "many"})
