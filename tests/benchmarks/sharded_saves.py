"""How long a sharded save holds the loop of each rank, against `torch.distributed.checkpoint.async_save`.

    python tests/benchmarks/sharded_saves.py [--ranks 2 4] [--saves 100] [--layers 24] [--width 512] [--dir .]

One process per rank, gloo, one thread each. One run of the trainer with ``strategy="fsdp"`` and Adam saves in turn by
itself and, in a hook, by ``async_save`` of the same tensors with a cached `DefaultStager`. Every save begins on all
ranks at the same time, once the one before is durable. In favour of ``async_save``, its state dicts are made before
the clock starts; the trainer's time has all that its loop does for a save. The first `WARM` saves of each, which
allocate memory, are left out. A ratio is that of two neighbours, on one rank; its bounds are those of a 95 % bootstrap
interval of the median.

Beside other work: ``chrt -r 20 python tests/benchmarks/sharded_saves.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import torch
from report import bounds, header, percentile
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils.data import DataLoader, TensorDataset

from trainer import Checkpoints, ModuleInterface, Trainer, TrainerArguments
from trainer.distributed.checkpointing import ShardedCheckpointing

WARM = 3
_EVERY = 2
"""Steps between two saves of one kind."""
_BAR = 0.5


class Saving(ModuleInterface):
    """Saves by ``async_save`` in the step after each of the trainer's own checkpoints."""

    def __init__(self, layers: int, width: int, folder: Path, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.data = TensorDataset(torch.randn(steps * distributed.get_world_size(), width))
        self.folder = folder
        self.theirs: list[float] = []
        self._group = distributed.new_group(backend="gloo")  # its thread's, not the loop's
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )

    def fsdp_units(self) -> list[nn.Module]:
        return list(self.net)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        return [self.optimizer], []

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        return DataLoader(self.data, batch_size=batch_size, sampler=sampler(self.data))

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return None

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> None:
        pass

    def on_end_train_step(self, global_step: int) -> None:
        if global_step % _EVERY == 0:
            return
        model, optimizer = get_state_dict(self.net, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        path = self.folder / f"dcp-{global_step}"
        distributed.barrier()
        begin = clock()
        saved: Any = dcp.async_save(state, checkpoint_id=path, process_group=self._group, async_stager=self._stager)
        self.theirs.append(clock() - begin)
        saved.result()
        distributed.barrier()
        if distributed.get_rank() == 0:
            shutil.rmtree(path)


class Timed:
    """Times the checkpoints of a run, and waits for each afterwards."""

    def __init__(self, folder: Path) -> None:
        self.ours: list[float] = []
        self._checkpoints = folder / "checkpoints"
        self._take = ShardedCheckpointing.take

    def take(self, checkpointing: ShardedCheckpointing, *args: Any, **more: Any) -> Any:
        distributed.barrier()
        begin = clock()
        fence = self._take(checkpointing, *args, **more)
        self.ours.append(clock() - begin)
        last = checkpointing._last
        assert last is not None
        while not ((self._checkpoints / str(last.name)).exists() or last.failed):
            time.sleep(0.005)
        return fence


def compare(layers: int, width: int, saves: int, folder: Path) -> None:
    """Measure on every rank; rank 0 prints."""
    steps, ranks = _EVERY * saves, distributed.get_world_size()
    module, timed = Saving(layers, width, folder, steps), Timed(folder)
    ShardedCheckpointing.take = lambda self, *args, **more: timed.take(self, *args, **more)  # type: ignore[method-assign]
    Trainer(
        module,
        TrainerArguments(train_batch_size=ranks, seed=0, strategy="fsdp"),
        sinks=[],
        checkpoints=Checkpoints(every_steps=_EVERY, every_minutes=None, at_end=False, keep_last=2),
        run_dir=folder,
    ).train()
    everyone: list[Any] = [None] * ranks
    distributed.all_gather_object(everyone, (timed.ours[WARM:], module.theirs[WARM:]))
    if distributed.get_rank():
        return
    nbytes = 3 * 4 * sum(one.numel() for one in module.parameters())
    print(f"\n{ranks} ranks, {nbytes / 1e6:.0f} MB of state together, {len(everyone[0][0])} saves of each per rank")
    print(f"{'ms blocked':24}{'median':>8}{'p99':>8}{'min':>8}{'max':>8}")
    for name, column in (("trainer", 0), ("async_save, cached", 1)):
        times = [1e3 * value for one in everyone for value in one[column]]
        numbers = statistics.median(times), percentile(times, 99), min(times), max(times)
        print(f"{name:24}" + "".join(f"{number:8.2f}" for number in numbers))
    ratios = [mine / other for one in everyone for mine, other in zip(*one, strict=True)]
    low, high = bounds(ratios)
    print(f"ratio {statistics.median(ratios):.3f}, 95 % from {low:.3f} to {high:.3f}; bar {_BAR}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--saves", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dir", type=Path, default=Path(), help="a folder on the disk to write to (default: this one)")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "RANK" not in os.environ:
        print(header(), flush=True)
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
                more = {"OMP_NUM_THREADS": "1", "SAVES_DIR": os.path.abspath(folder)}
                subprocess.run([*launcher, __file__, *given], check=True, env=os.environ | more)
        return 0
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    compare(options.layers, options.width, options.saves, Path(os.environ["SAVES_DIR"]))
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
