"""Runs of several ranks to which something happens at a step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainer import ModuleInterface, Trainer, TrainerArguments

RANK = int(os.environ.get("RANK", "0"))
LIFE = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
"""How often torchrun has restarted the ranks."""
ROWS, BATCH = 60, 4


class Rows(Dataset[torch.Tensor]):
    """Rows of random numbers. ``fault`` is called with ``data`` and the row's number."""

    def __init__(self, fault: Callable[[str, int], object]) -> None:
        self.rows = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.fault = fault

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> torch.Tensor:
        self.fault("data", number)
        return self.rows[number]


class Small(ModuleInterface):
    """A small network in float64.

    Args:
        fault: Called with ``train`` or ``val`` and the step before each batch; what it returns is added to the loss.
    """

    def __init__(self, fault: Callable[[str, int], object] = lambda stage, step: None) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4).double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        self.fault = fault
        self.workers = 0
        self.steps: list[int] = []

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        return [torch.optim.AdamW(self.parameters(), lr=1e-2)], []

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        rows = Rows(self.fault)
        return DataLoader(rows, batch_size=batch_size, sampler=sampler(rows), num_workers=self.workers)

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        rows = Rows(lambda stage, number: None)
        return DataLoader(rows, batch_size=batch_size, sampler=sampler(rows), num_workers=self.workers)

    def _loss(self, stage: str, step: int, batch: Any) -> torch.Tensor:
        added = self.fault(stage, step)
        loss = self.layer(batch).pow(2).mean()
        return loss if added is None else loss + added

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.steps.append(global_step)
        return self._loss("train", global_step, batch)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self._loss("val", global_step, batch)


def trainer(module: Small, *, arguments: dict[str, Any] | None = None, **more: Any) -> Trainer:
    """Return a trainer without sinks."""
    chosen = {"epochs": 3, "train_batch_size": BATCH, "seed": 1} | (arguments or {})
    return Trainer(module, TrainerArguments(**chosen), **{"sinks": [], **more})


def outcome(module: Small, one: Trainer) -> dict[str, Any]:
    """Train, and return how the run has ended on this rank."""
    try:
        result = one.train()
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "steps": module.steps}
    return {"status": result.status, "reason": result.reason, "step": result.global_step, "steps": module.steps}


def leave(name: str, found: object) -> None:
    """Leave what this rank has found for the test."""
    Path(f"{name}-{RANK}.json").write_text(json.dumps(found))


def found_by(folder: Path, name: str, ranks: int = 2) -> list[Any]:
    """Return what each rank has left."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
