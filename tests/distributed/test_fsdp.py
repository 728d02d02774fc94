"""Modules whose parameters are divided among ranks (FSDP2) train as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ranks import StartRanks
from support.sharded import SHARDED, Masked
from support.shared_runs import Case, check_same, train

PROGRAM = """
import os, torch
from pathlib import Path
from support.sharded import SHARDED, Masked
from support.shared_runs import Case, train
from trainer.distributed import Fsdp

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
strategy = Fsdp(units=["Linear"], replicate=size // 2, reshard_after_forward=size == 2)
found = [train(SHARDED[number], Path(f"run-{number}"), strategy=strategy) for number in NUMBERS]
torch.manual_seed(rank)  # each rank constructs other weights; those of rank 0 count
masked = Masked(Case(rows=60, micro=2))
if rank:
    torch.nn.init.normal_(masked.second.weight)
found.append(train(masked, Path("masked"), strategy=Fsdp(units=["Linear"], activation_checkpointing=True)))
torch.save(found, f"found-{rank}.pt")
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("world_size", "numbers"), [(2, range(len(SHARDED))), (4, (1, 2, 3))])
def test_divided_modules_train_what_one_process_trains(
    ranks: StartRanks, tmp_path: Path, world_size: int, numbers: tuple[int, ...]
) -> None:
    """In float64; four ranks have two copies of the model."""
    numbers = tuple(numbers)
    started = ranks(PROGRAM.replace("NUMBERS", repr(numbers)), world_size)
    alone = [train(SHARDED[number], tmp_path / f"alone-{number}", strategy="single") for number in numbers]
    alone.append(train(Masked(Case(rows=60, micro=2)), tmp_path / "alone-masked", strategy="single"))
    started.end().check()
    for rank in range(world_size):
        everything = torch.load(tmp_path / f"found-{rank}.pt", weights_only=False)
        for number, one, other in zip((*numbers, "masked"), alone, everything, strict=True):
            check_same(one, other, (rank, number))
