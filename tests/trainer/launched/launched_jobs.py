"""Factories of trainers for `test_launch`, which run in processes of their own."""

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

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Checkpoints, ModuleInterface, Trainer, TrainerArguments


class Diverged(Exception):
    """The user's own."""


class Net(ModuleInterface):
    """A linear regression, which does something at a step."""

    def __init__(self, deed: str = "", at: int = 5, workers: int = 0, step_s: float = 0.0) -> None:
        super().__init__()
        self.deed, self.at, self.workers, self.step_s = deed, at, workers, step_s
        self.linear = nn.Linear(4, 1)
        self.data = TensorDataset(torch.ones(16, 4), torch.ones(16, 1))

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.01)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        workers = self.workers
        return DataLoader(
            self.data, batch_size, sampler=sampler(self.data), num_workers=workers, persistent_workers=workers > 0
        )

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return DataLoader(self.data, batch_size)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.linear(x), y)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        time.sleep(self.step_s)
        if global_step == self.at and self.deed:
            getattr(self, self.deed)()
        return self.loss(batch)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.loss(batch)

    def fail(self) -> None:
        print("about to fail")
        raise Diverged("it was höher") from ValueError("the cause")

    def leave(self) -> None:
        sys.exit(3)

    def vanish(self) -> None:
        print("about to vanish")
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])  # which watches over nobody
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


def build(epochs: int = 2, stop_grace_s: float = 20.0, every_steps: int | None = None, **options: Any) -> Trainer:
    """One that trains ``epochs`` of two steps."""
    arguments = TrainerArguments(epochs=epochs, train_batch_size=8, device="cpu", stop_grace_s=stop_grace_s)
    return Trainer(Net(**options), arguments, checkpoints=Checkpoints(every_steps=every_steps))


def build_with(run_dir: str, journal: bool = True) -> Trainer:
    """One that has chosen its folder."""
    arguments = TrainerArguments(epochs=1, train_batch_size=8, device="cpu")
    return Trainer(Net(), arguments, run_id="mine", run_dir=run_dir, journal=journal, checkpoints=False)


def build_checked(nan: float, data: bytes, nested: dict[str, list[Any]], epochs: int) -> Trainer:
    """One that gets values of all kinds."""
    assert math.isnan(nan), nan
    assert data == b"\0\xff", data
    assert nested == {"a": [1, None, math.inf, True, "ü"]}, nested
    print("built")
    return build(epochs=epochs, step_s=0.001)
