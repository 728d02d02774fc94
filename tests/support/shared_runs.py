"""Runs that must give the same on one rank and on several."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from events.protocol import RunResult
from trainer import Checkpoints, ModuleInterface, Trainer, TrainerArguments
from trainer.distributed import Ddp
from trainer.distributed.local import whole
from trainer.errors import PeerFailed


@dataclasses.dataclass(frozen=True)
class Case:
    """What to train, and how."""

    rows: int = 203
    micro: int = 4
    batch: int = 16
    clips: bool = False
    weighs: bool = False
    """Whether the module has a ``batch_weight``: half of the batches count three times, and some nothing."""
    leaves: int = 0
    """`train_step` returns None for batches whose first row is below this."""
    drops_last: bool = False
    in_lists: bool = False
    """Whether the data are lists of batches instead of dataloaders with the given sampler."""
    unused: bool = False
    """Whether a parameter is used in some batches only."""
    closure: bool = False
    """Whether the optimizer is L-BFGS."""
    manual: bool = False
    """Whether the module applies its losses itself: two of them, each to a part of its parameters.

    Each third step only adds to the gradients, for the next one.
    """
    bad_dummies: bool = False
    """Whether the loss of a batch that is computed by a rank without data is NaN, and so are its gradients."""
    dropout: float = 0.0
    epochs: int = 2

    def arguments(self, **more: Any) -> TrainerArguments:
        strategy = Ddp(find_unused_parameters=True) if self.unused else "auto"
        return TrainerArguments(
            **{
                "epochs": self.epochs,
                "train_batch_size": self.batch,
                "gpu_batch_size_limit": self.micro,
                "val_batch_size": 8,
                "seed": 1,
                "clip_grads": self.clips,
                "strategy": strategy,
                **more,
            }
        )


class Classifier(ModuleInterface):
    """A small network in float64, which logs in its steps and keeps what its hooks get."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.x = torch.randn(case.rows, 12, generator=generator, dtype=torch.float64)
        self.y = torch.randint(4, (case.rows,), generator=generator)
        self.first, self.second = nn.Linear(12, 32).double(), nn.Linear(32, 4).double()
        self.extra = nn.Linear(12, 4).double() if case.unused else None
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
        self.fails_at = 0
        self._is_bad = False
        self.validated: list[torch.Tensor] = []
        self.trained: list[torch.Tensor] = []
        self.manual_optimization = case.manual
        if case.weighs:
            self.batch_weight = self._batch_weight  # type: ignore[method-assign]

    def _batch_weight(self, batch: Any) -> float:
        return float(int(batch[2][0]) % 3 if len(batch[2]) else 0)

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        if self.case.manual:
            parts = self.first, self.second
            return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts], []
        if self.case.closure:
            return [torch.optim.LBFGS(self.parameters(), max_iter=3, line_search_fn="strong_wolfe")], []
        return [torch.optim.AdamW(self.parameters(), lr=1e-2)], []

    def loader(self, sampler: Any, size: int, *, drops: bool) -> Any:
        data = TensorDataset(self.x, self.y, torch.arange(self.case.rows))
        loader = DataLoader(data, batch_size=size, sampler=sampler(data), drop_last=drops)
        return [data[i : i + size] for i in range(0, len(data), size)] if self.case.in_lists else loader

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        return self.loader(sampler, batch_size, drops=self.case.drops_last)

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return {name: self.loader(sampler, batch_size, drops=False) for name in ("a", "b")}

    get_test_dataloaders = get_val_dataloaders

    def losses(self, batch: Any) -> torch.Tensor:
        return self.judge(
            nn.functional.dropout(torch.tanh(self.first(batch[0])), self.case.dropout, self.training), batch
        )

    def judge(self, hidden: torch.Tensor, batch: Any) -> torch.Tensor:
        logits = self.second(hidden)
        if self.extra is not None and int(batch[2][0]) % 2:
            logits = logits + self.extra(batch[0])
        if self._is_bad and self.training:
            logits = logits * torch.nan
        return nn.functional.cross_entropy(logits, batch[1], reduction="none")

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        if global_step == self.fails_at:
            raise Boom(f"at step {global_step}")
        self._is_bad = self.case.bad_dummies and self._has_no_data(global_step)
        if int(batch[2][0]) < self.case.leaves:
            return None
        if self.case.manual:
            return self._by_turns(global_step, batch)
        return self.losses(batch).mean(), batch[2]

    def _has_no_data(self, global_step: int) -> bool:
        case, rank, ranks = self.case, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        steps = -(-case.rows // case.batch)
        block = min(case.micro, case.batch // ranks)
        return global_step % steps == 0 and rank * block >= case.rows - (steps - 1) * case.batch

    def _by_turns(self, global_step: int, batch: Any) -> Any:
        hidden = torch.tanh(self.first(batch[0]))
        loss = self.judge(hidden, batch).mean() + self.judge(-hidden, batch).mean()
        if global_step % 3 == 0:
            loss.backward()
        else:
            self.optimize(loss, 0, retain_graph=True)
            loss = self.judge(hidden, batch).mean()  # its gradients reach the other part, too
            self.optimize(loss, 1)
        return loss.detach(), batch[2]

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        losses = self.losses(batch)
        self.log("worst", losses.max(), reduce="max")
        self.log("total", losses.sum(), reduce="sum")
        self.log("mean", losses.mean())
        return losses.mean(), batch[2]

    test_step = val_step

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.validated.append(outputs[1])

    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self.trained.append(outputs[1])


class Boom(Exception):
    """An error of the user's."""


def start(case: Case, folder: Path) -> None:
    """Train up to an error in step 8; the checkpoint of step 6 is in the middle of the first epoch."""
    module = Classifier(case)
    module.fails_at = 8
    checkpoints = Checkpoints(every_steps=3, every_minutes=None)
    with contextlib.suppress(Boom, PeerFailed):
        Trainer(module, case.arguments(), sinks=[], checkpoints=checkpoints, run_dir=folder, run_id="run").train()


def resume(case: Case, folder: Path, **more: Any) -> dict[str, Any]:
    """Resume a run that `start` has begun, and return as `train`."""
    module = Classifier(case)
    result = Trainer(module, case.arguments(**more), sinks=[], run_dir=folder, run_id="run", resume="auto").train()
    return found(module, result)


def train(what: Case | Classifier, folder: Path, **more: Any) -> dict[str, Any]:
    """Train, and return all that must be the same."""
    module = what if isinstance(what, Classifier) else Classifier(what)
    result = Trainer(module, module.case.arguments(**more), sinks=[], checkpoints=False, run_dir=folder).train()
    return found(module, result)


def found(module: Classifier, result: RunResult) -> dict[str, Any]:
    """Return what a run has left."""
    return {
        "weights": torch.cat([whole(value).flatten() for value in module.state_dict().values()]),
        "steps": result.global_step,
        "metrics": result.metrics,
        "validated": module.validated,
        "trained": module.trained,
        "folder": result.run_dir,
        "run_id": result.run_id,
    }


def check_same(alone: dict[str, Any], found: dict[str, Any], what: object) -> None:
    """Check that a run has left what another one has."""
    assert found["steps"] == alone["steps"], what
    assert (found["weights"] - alone["weights"]).abs().max() < 1e-12, what
    assert found["metrics"].keys() == alone["metrics"].keys(), what
    for name, value in alone["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-12, abs=1e-12), (what, name)
    for name in ("validated", "trained"):  # in order, without duplicates
        assert len(found[name]) == len(alone[name]), what
        assert all(torch.equal(one, other) for one, other in zip(found[name], alone[name], strict=True)), (what, name)


CASES = [
    Case(),
    Case(rows=193, micro=8, clips=True),
    Case(rows=3),  # ranks without a row
    Case(weighs=True, leaves=60, clips=True, micro=2),
    Case(rows=20, leaves=7),
    Case(drops_last=True),
    Case(rows=77, in_lists=True),
    Case(unused=True),
    Case(rows=50, closure=True, epochs=1),
    Case(rows=37, manual=True, micro=16, clips=True, bad_dummies=True),
    Case(rows=20, bad_dummies=True),
]
