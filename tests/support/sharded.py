"""Runs whose parameters are divided among ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.shared_runs import CASES, Case, Classifier
from torch import nn

from trainer import Trainer
from trainer.callbacks import EMA, ModelStatistics
from trainer.distributed.local import whole

SHARDED = [*(CASES[number] for number in (0, 1, 2, 5, 6, 8, 9, 10)), Case(rows=60, weighs=True, clips=True, micro=2)]
"""`train_step` returns a loss for each batch, or applies losses to each; by its weight, some count nothing."""


class Masked(Classifier):
    """Its loss is a mean over some rows, and NaN for a batch without any; so are its gradients."""

    def _mask(self, batch: Any) -> torch.Tensor:
        return batch[2] % 3 == 0

    def batch_weight(self, batch: Any) -> float:
        return float(self._mask(batch).sum())

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        mask = self._mask(batch)
        return (self.losses(batch) * mask).sum() / mask.sum(), batch[2]


class Infinite(Classifier):
    """The loss of a batch with row 5 is infinite."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        loss = self.losses(batch).mean()
        return loss * torch.where((batch[2] == 5).any(), torch.inf, 1.0), batch[2]


class Penalized(Classifier):
    """Its loss is of the gradients of its networks."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x = batch[0].requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses([x, *batch[1:]]).sum(), x, create_graph=True)
        self.optimize(gradient.square().sum(), 0)


class Stacked(Classifier):
    """Has blocks, in float32."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def losses(self, batch: Any) -> torch.Tensor:
        x = batch[0]
        for block in self.blocks:
            x = x + block(x.to(torch.float32)).to(x.dtype)
        return super().losses([x, *batch[1:]])


def observed(module: Classifier, folder: Path, **more: Any) -> dict[str, Any]:
    """Train with averaged weights and statistics; return both, and the metrics of the run."""
    ema, statistics = EMA(module, decay=0.5, validate=True), ModelStatistics(module, 3, histograms=True)
    Trainer(
        module,
        module.case.arguments(**more),
        callbacks=[ema, statistics],
        sinks=[],
        checkpoints=False,
        run_dir=folder,
    ).train()
    weights = torch.cat([whole(value).flatten() for value in ema.weights().values()])
    plain = Classifier(module.case)
    ema.copy_to(plain)
    assert torch.equal(torch.cat([value.flatten() for value in plain.state_dict().values()]), weights)
    outputs = Trainer(module, module.case.arguments(**more), sinks=[], callbacks=[ema], run_dir=folder / "test").test()
    return {"weights": weights, "tested": outputs["a"][0]}
