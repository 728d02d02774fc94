"""What the trainer costs on several ranks: the throughput of its steps against torch's own wrapper in a bare loop.

    python tests/benchmarks/ranks.py [--ranks 2 4] [--rounds 150] [--steps 100] [--strategy ddp] [--models mlp]

One process per rank, gloo, one thread each. Each round trains a block of steps with every variant, in an order that
changes, with a block of the bare loop before and after each: the ratio is the mean of these two over the variant's
time, so 1 is as fast and less is slower. The first tenth of each block is not timed. The bare loop is the one that
people write: a `DataLoader` with a `DistributedSampler`, `DistributedDataParallel` or ``fully_shard``, ``backward``,
``step``, ``zero_grad``. Against itself it shows what the machine adds. The bound is the lower end of a 95 % bootstrap
interval of the median ratio, and the bar is 0.98.

    python tests/benchmarks/ranks.py --profile [--ranks 2]

lists where rank 0's own time in a long block of the trainer goes, by cProfile.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from report import bounds, header
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trainer import ModuleInterface, Stage, Trainer, TrainerArguments

_ROWS = {"mlp": 32, "transformer": 4}
"""Rows of a step on each rank."""
_BAR = 0.98
_strategy: Literal["ddp", "fsdp"] = "ddp"


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first, self.last = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        repeated = self.first(x).unsqueeze(1).expand(-1, 32, -1)  # (B, 32, 128)
        logits: torch.Tensor = self.last(self.layers(repeated).mean(1))
        return logits


def make_network(model: str) -> nn.Module:
    if model == "transformer":
        return _Encoder()
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Timed(ModuleInterface):
    """Notes when each step begins."""

    def __init__(self, model: str, data: TensorDataset) -> None:
        super().__init__()
        self.net, self.data = make_network(model), data
        self.begins: list[int] = []

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [torch.optim.AdamW(self.parameters(), lr=1e-3)], []

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        return DataLoader(self.data, batch_size=batch_size, sampler=sampler(self.data))

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return None

    def fsdp_units(self) -> list[nn.Module]:
        return [one for one in self.net.modules() if isinstance(one, nn.TransformerEncoderLayer)] or [self.net]

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        self.begins.append(time.perf_counter_ns())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def val_step(self, global_step: int, batch: Any, device: Any) -> None:
        pass

    def step_us(self) -> float:
        """Return the mean time of a step, without the first tenth of them."""
        begins = self.begins[len(self.begins) // 10 :]
        return (begins[-1] - begins[0]) / (len(begins) - 1) / 1e3


def bare(model: str, data: TensorDataset, rows: int) -> float:
    torch.manual_seed(0)
    module = Timed(model, data)
    if _strategy == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(module)
    else:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for unit in module.fsdp_units():
            fully_shard(unit, mesh=mesh)
        wrapped = fully_shard(module, mesh=mesh)
    (optimizer,), _ = module.get_optimizers_schedulers(0, 0)
    for step, batch in enumerate(DataLoader(data, batch_size=rows, sampler=DistributedSampler(data))):
        loss = wrapped(Stage.TRAIN, step + 1, batch, "cpu")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.step_us()


def trained(model: str, data: TensorDataset, rows: int, *, journal: bool) -> float:
    module = Timed(model, data)
    arguments = TrainerArguments(train_batch_size=rows * distributed.get_world_size(), seed=0, strategy=_strategy)
    with tempfile.TemporaryDirectory() as folder:
        where = {"run_dir": folder} if journal else {"journal": False}
        Trainer(module, arguments, sinks=[], checkpoints=False, **where).train()
    return module.step_us()


VARIANTS: dict[str, tuple[float | None, Callable[[str, TensorDataset, int], float]]] = {
    "bare loop against itself": (None, bare),
    "trainer, no journal": (_BAR, lambda *block: trained(*block, journal=False)),
    "trainer, journal on": (_BAR, lambda *block: trained(*block, journal=True)),
}
"""The bar and the block of each."""


def compare(model: str, rounds: int, steps: int) -> None:
    """Measure all variants; on every rank at the same time. Rank 0 prints."""
    rank, ranks, rows = distributed.get_rank(), distributed.get_world_size(), _ROWS[model]
    count = rows * ranks * steps
    block = model, TensorDataset(torch.randn(count, 64), torch.randint(10, (count,))), rows
    order, ratios, times = random.Random(0), {name: [] for name in VARIANTS}, []  # type: ignore[var-annotated]

    def measure(run: Callable[..., float]) -> float:
        distributed.barrier()
        return run(*block)

    for _, run in VARIANTS.values():
        measure(run)
    before = measure(bare)
    for _ in range(rounds):
        for name in order.sample(list(VARIANTS), len(VARIANTS)):  # the same on all ranks
            measured = measure(VARIANTS[name][1])
            after = measure(bare)
            ratios[name].append((before + after) / 2 / measured)
            times.append(after)
            before = after
    if rank == 0:
        print(
            f"\n{model}, {ranks} ranks: bare step {statistics.median(times):.0f} us; {rounds} rounds of {steps} steps"
        )
        print(f"{'throughput':28}{'median':>8}{'95 % from':>11}{'bar':>7}")
        for name, (bar, _) in VARIANTS.items():
            shown = f"{bar:7.2f}" if bar else ""
            print(f"{name:28}{statistics.median(ratios[name]):8.3f}{bounds(ratios[name])[0]:11.3f}{shown}", flush=True)


def profile(steps: int) -> None:
    """Profile the trainer on rank 0, and print its functions by their own time, in microseconds per step."""
    rows = _ROWS["mlp"]
    count = rows * distributed.get_world_size() * steps
    data = TensorDataset(torch.randn(count, 64), torch.randint(10, (count,)))
    profiler = cProfile.Profile()
    trained("mlp", data, rows, journal=True)
    if distributed.get_rank() == 0:
        profiler.enable()
    trained("mlp", data, rows, journal=True)
    profiler.disable()
    if distributed.get_rank() == 0:
        entries = [
            (own, total, calls, f"{Path(path).name}:{line} {name}")
            for (path, line, name), (_, calls, own, total, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
            if calls >= steps
        ]
        print(f"{'own us':>9}{'total us':>10}{'calls':>7}  per step")
        for own, total, calls, name in sorted(entries, reverse=True)[:45]:
            print(f"{own / steps * 1e6:9.1f}{total / steps * 1e6:10.1f}{calls / steps:7.1f}  {name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--models", nargs="+", choices=list(_ROWS), default=list(_ROWS))
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    global _strategy
    _strategy = options.strategy
    if "RANK" not in os.environ:
        print(header(), flush=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        for ranks in options.ranks:
            command = [
                *launcher,
                f"--nproc-per-node={ranks}",
                __file__,
                *(sys.argv[1:] if arguments is None else arguments),
            ]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return 0
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    if options.profile:
        profile(options.steps)
    else:
        for model in options.models:
            compare(model, options.rounds, options.steps)
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
