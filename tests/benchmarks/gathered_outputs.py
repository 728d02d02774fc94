"""Memory of gathering the outputs of a validation from all ranks: linear in the outputs.

    python tests/benchmarks/gathered_outputs.py [--ranks 2 4] [--mib 16 32 64 128]

Each rank evaluates its part of rows whose outputs have the given size together; a hook of the module takes all of them,
on every rank. Printed is the peak of resident memory of the whole validation above that before it, of the rank with the
most, and the same in multiples of the outputs: linear means that the multiple does not grow.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from report import header
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import ModuleInterface, Trainer, TrainerArguments

_MIB = 2**20
_WIDTH = 1024
"""float32 outputs per row: 4 KiB."""


class Wide(ModuleInterface):
    """Returns 4 KiB for each row, which its hook adds up."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.net, self.rows, self.total = nn.Linear(1, 1), rows, 0.0

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        return self.get_val_dataloaders(sampler, batch_size)

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        data = TensorDataset(torch.arange(self.rows, dtype=torch.float32))
        return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        return self.net(batch[0].unsqueeze(1)).mean()

    def val_step(self, global_step: int, batch: Any, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return batch[0].mean(), batch[0].unsqueeze(1).expand(-1, _WIDTH).clone()  # (), (B, 1024)

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        _, outputs = val_step_collated_outputs
        assert len(outputs) == self.rows
        self.total = float(outputs[:, 0].double().sum())


def peak_of_validation(mib: int) -> int:
    """Return the bytes that a validation adds at its peak."""
    module = Wide(mib * _MIB // (4 * _WIDTH))
    arguments = TrainerArguments(train_batch_size=64, val_batch_size=64, seed=0, strategy="ddp")
    trainer = Trainer(module, arguments, sinks=[], journal=False, checkpoints=False)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    trainer.validate()
    assert module.total == module.rows * (module.rows - 1) / 2
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        print(header())
        print("ranks  outputs MiB   peak MiB    times", flush=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        for ranks in options.ranks:
            command = [*launcher, f"--nproc-per-node={ranks}", __file__, "--mib", *map(str, options.mib)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return 0
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    peak_of_validation(1)  # imports, pools
    for mib in options.mib:
        peak = torch.tensor(peak_of_validation(mib))
        distributed.all_reduce(peak, op=distributed.ReduceOp.MAX)
        if rank == 0:
            times = int(peak) / mib / _MIB
            print(f"{ranks:5}{mib:13}{int(peak) / _MIB:11.0f}{times:9.2f}", flush=True)
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
