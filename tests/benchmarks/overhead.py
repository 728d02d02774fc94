"""What the trainer costs a launch-bound loop: the tiny MLP against a bare loop, in total time.

    python tests/benchmarks/overhead.py [--pairs 40] [--steps 2000]

Each round runs every variant once, in an order that changes, with the bare loop before and after each; a variant's
ratio is its time over the mean of these two. The bare loop against itself is shown in the same way: its spread is what
the machine adds. The bound is the upper end of a 95 % bootstrap interval of the median ratio.

The bare loop calls ``optimizer.zero_grad()``, as people write it. The trainer clears the gradients itself, which is
quicker; how much of each ratio that hides, the bare loop that does likewise shows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from report import bounds, header
from torch import nn

from trainer import CallbackInterface, Delivery, ModuleInterface, Stage, Trainer, TrainerArguments


class TinyMLP(ModuleInterface):
    """Three layers of 64 with Adam, batches of 32 rows: a step takes a quarter of a millisecond, most of it Python."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.batches = [(torch.randn(32, 64), torch.randn(32, 1))] * steps

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [torch.optim.Adam(self.parameters(), lr=1e-3)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.batches

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return None

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return None


class Sleeps(CallbackInterface):
    """Takes 10 ms for each step."""

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        time.sleep(0.01)


class Hangs(CallbackInterface):
    """Never returns from its first hook."""

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        time.sleep(3600)


class Raises(CallbackInterface):
    """Fails at its first hook."""

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        raise ValueError("benchmark")


class Counts(CallbackInterface):
    """Counts the steps, and takes no outputs."""

    def __init__(self) -> None:
        self.steps = 0

    def on_end_train_step(self, global_step: int) -> None:  # type: ignore[override]
        self.steps += 1


class Receives(Counts):
    """Counts the steps, and receives the outputs of each: tensors of its own, made on its thread."""

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        self.steps += 1


def bare(steps: int, by_hand: bool = False) -> float:
    """The loop that a user would write; returns its seconds. ``by_hand`` clears the gradients as the trainer does."""
    module = TinyMLP(steps)
    (optimizer,), _ = module.get_optimizers_schedulers(0, 0)
    module.train()
    begin = time.perf_counter()
    for step, batch in enumerate(module.batches):
        loss = module(Stage.TRAIN, step + 1, batch, "cpu")
        loss.backward()
        optimizer.step()
        if by_hand:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            optimizer.zero_grad()
    return time.perf_counter() - begin


def trained(steps: int, folder: str, **options: Any) -> float:
    """The same by the trainer; returns the loop's seconds, without set-up and drain."""
    arguments = TrainerArguments(train_batch_size=32, device="cpu", drain_timeout_s=0.2)
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        if options.get("journal", True):
            options["run_dir"] = f"{run_dir}/run"
        if "sinks" in options:
            return Trainer(TinyMLP(steps), arguments, **options).train().ledger.wall_s
        with contextlib.redirect_stderr(io.StringIO()):
            return Trainer(TinyMLP(steps), arguments, **options).train().ledger.wall_s


def variants(steps: int, folder: str) -> dict[str, tuple[float, Callable[[], float]]]:
    """Each variant with its bar."""
    dropping = Delivery(overflow="drop_oldest", on_error="disable")

    def run(**options: Any) -> Callable[[], float]:
        return lambda: trained(steps, folder, **options)

    def with_callback(callback: CallbackInterface) -> Callable[[], float]:
        return run(sinks=[], journal=False, callbacks=[(callback, dropping)])

    return {
        "bare against itself": (0.0, lambda: bare(steps)),
        "bare, gradients cleared by hand": (0.0, lambda: bare(steps, by_hand=True)),
        "nothing attached": (1.03, run(sinks=[], journal=False)),
        "journal": (1.06, run(sinks=[])),
        "journal and console": (1.08, run()),
        "two callbacks that count": (1.06, run(sinks=[], journal=False, callbacks=[Counts(), Counts()])),
        # The loop copies the outputs, and two threads make tensors of them, which share the interpreter lock with it.
        "two callbacks that receive outputs": (
            1.20,
            run(sinks=[], journal=False, callbacks=[Receives(), Receives()]),
        ),
        "callback that sleeps 10 ms a step": (1.10, with_callback(Sleeps())),
        "callback that hangs": (1.06, with_callback(Hangs())),
        "callback that raises": (1.06, with_callback(Raises())),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=2_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(header())
    ratios: dict[str, list[float]] = {}
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = variants(options.steps, folder)
        for _, run in chosen.values():
            run()
        before = bare(options.steps)
        for _ in range(options.pairs):
            for name in random.sample(list(chosen), len(chosen)):
                measured = chosen[name][1]()
                after = bare(options.steps)
                ratios.setdefault(name, []).append(2 * measured / (before + after))
                times.append(after)
                before = after
    period_us = statistics.median(times) / options.steps * 1e6
    print(f"bare step: {period_us:.0f} us; {options.pairs} pairs of {options.steps} steps\n")
    print(f"{'':36}{'median':>8}{'95 % up to':>12}{'p99':>8}{'bar':>7}")
    for name, (bar, _) in chosen.items():
        values = sorted(ratios[name])
        p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
        shown = f"{bar:7.2f}" if bar else f"{'':7}"
        print(f"{name:36}{statistics.median(values):8.3f}{bounds(values)[1]:12.3f}{p99:8.3f}{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
