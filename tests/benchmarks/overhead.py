"""What the trainer costs a launch-bound loop: the tiny MLP against a bare loop, in total time.

    python tests/benchmarks/overhead.py [--pairs 40] [--steps 2000]

Each round runs every variant once, in an order that changes, with the bare loop before and after each; a variant's
ratio is its time over the mean of these two. The bare loop against itself is shown in the same way: its spread is what
the machine adds. The bound is the upper end of a 95 % bootstrap interval of the median ratio.

The bare loop calls ``optimizer.zero_grad()``, as people write it. The trainer clears the gradients itself, which is
quicker; how much of each ratio that hides, the bare loop that does likewise shows.

    python tests/benchmarks/overhead.py --large [--pairs 40] [--steps 100]

measures a model of 17 MB, whose step consists of memory traffic, and for which the order of clearing the gradients
matters on a CPU: right after a step, as most people write it, or right before the next backward pass. Each measurement
is a process of its own, since the order is a matter of what the allocator has returned to the system. The ratio is over
the quicker order of each round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import statistics
import subprocess
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


class ManualMLP(TinyMLP):
    """The same, which optimizes itself."""

    manual_optimization = True

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        loss = super().train_step(global_step, batch, device)
        self.optimize(loss)
        return loss


class Large(TinyMLP):
    """Four layers of 1,024 with SGD, batches of 96 rows: 17 MB of weights, as much of gradients."""

    def __init__(self, steps: int) -> None:
        super().__init__(0)
        layers = [module for _ in range(4) for module in (nn.Linear(1024, 1024), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(1024, 1))
        self.batches = [(torch.randn(96, 1024), torch.randn(96, 1))] * steps

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=1e-3)], []


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


def bare(steps: int, clear: str = "zero_grad", kind: type[TinyMLP] = TinyMLP) -> float:
    """The loop that a user would write; returns its seconds.

    Args:
        clear: How gradients are cleared: ``zero_grad`` after the step, or by hand ``after`` it or ``before_backward``.
    """
    module = kind(steps)
    (optimizer,), _ = module.get_optimizers_schedulers(0, 0)
    module.train()

    def clear_by_hand() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    begin = time.perf_counter()
    for step, batch in enumerate(module.batches):
        loss = module(Stage.TRAIN, step + 1, batch, "cpu")
        if clear == "before_backward":
            clear_by_hand()
        loss.backward()
        optimizer.step()
        if clear == "zero_grad":
            optimizer.zero_grad()
        elif clear == "after":
            clear_by_hand()
    return time.perf_counter() - begin


def trained(steps: int, folder: str, kind: type[TinyMLP] = TinyMLP, **options: Any) -> float:
    """The same by the trainer; returns the loop's seconds, without set-up and drain."""
    arguments = TrainerArguments(train_batch_size=32, device="cpu", drain_timeout_s=0.2)
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        if options.get("journal", True):
            options["run_dir"] = f"{run_dir}/run"
        if "sinks" in options:
            return Trainer(kind(steps), arguments, **options).train().ledger.wall_s
        with contextlib.redirect_stderr(io.StringIO()):
            return Trainer(kind(steps), arguments, **options).train().ledger.wall_s


def variants(steps: int, folder: str) -> dict[str, tuple[float, Callable[[], float]]]:
    """Each variant with its bar."""
    dropping = Delivery(overflow="drop_oldest", on_error="disable")

    def run(**options: Any) -> Callable[[], float]:
        return lambda: trained(steps, folder, **options)

    def with_callback(callback: CallbackInterface) -> Callable[[], float]:
        return run(sinks=[], journal=False, callbacks=[(callback, dropping)])

    return {
        "bare against itself": (0.0, lambda: bare(steps)),
        "bare, gradients cleared by hand": (0.0, lambda: bare(steps, clear="after")),
        "nothing attached": (1.03, run(sinks=[], journal=False)),
        "manual optimization": (1.05, run(kind=ManualMLP, sinks=[], journal=False)),
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


LARGE: dict[str, Callable[[int], float]] = {
    "after the step": lambda steps: bare(steps, "after", Large),
    "before backward": lambda steps: bare(steps, "before_backward", Large),
    "trainer": lambda steps: trained(steps, tempfile.gettempdir(), Large, sinks=[], journal=False),
}


def in_own_process(name: str, steps: int) -> float:
    """Milliseconds per step of one of `LARGE`."""
    command = [sys.executable, __file__, "--one", name, "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout) * 1e3 / steps


def compare_large(pairs: int, steps: int) -> None:
    """Print the table of the large model."""
    times: dict[str, list[float]] = {name: [] for name in LARGE}
    ratios = []
    for _ in range(pairs):
        for name in random.sample(list(LARGE), len(LARGE)):
            times[name].append(in_own_process(name, steps))
        best = min(times["after the step"][-1], times["before backward"][-1])
        ratios.append(times["trainer"][-1] / best)
    for name, values in times.items():
        print(f"{name:20}{statistics.median(values):8.2f} ms a step, {min(values):.2f} to {max(values):.2f}")
    best = min(statistics.median(times[name]) for name in ("after the step", "before backward"))
    print(
        f"\ntrainer over the quicker order, of the medians: {statistics.median(times['trainer']) / best:.3f}; bar 1.03"
    )
    print(f"of each round: median {statistics.median(ratios):.3f}, 95 % up to {bounds(ratios)[1]:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, help="2,000, or 100 with --large")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--one", choices=list(LARGE), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.steps = options.steps or (100 if options.large or options.one else 2_000)
    torch.set_num_threads(1)
    if options.one:
        print(LARGE[options.one](options.steps))
        return 0
    print(header())
    if options.large:
        compare_large(options.pairs, options.steps)
        return 0
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
