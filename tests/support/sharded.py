"""Runs whose parameters are divided among ranks."""

from __future__ import annotations

from typing import Any

import torch
from support.shared_runs import CASES, Case, Classifier

SHARDED = [*(CASES[number] for number in (0, 1, 2, 5, 6, 8)), Case(rows=60, weighs=True, clips=True, micro=2)]
"""`train_step` returns a loss for each batch; by its weight, some count nothing."""


class Masked(Classifier):
    """Its loss is a mean over some rows, and NaN for a batch without any; so are its gradients."""

    def _mask(self, batch: Any) -> torch.Tensor:
        return batch[2] % 3 == 0

    def batch_weight(self, batch: Any) -> float:
        return float(self._mask(batch).sum())

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        mask = self._mask(batch)
        return (self.losses(batch) * mask).sum() / mask.sum(), batch[2]
