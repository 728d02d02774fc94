"""Runs whose parameters are divided among ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.shared_runs import CASES, Case, Classifier
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import Trainer
from trainer.callbacks import EMA, ModelStatistics
from trainer.distributed.local import local, whole

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


class Spoiled(Classifier):
    """The gradients of step 3 are not finite in one row of a weight, and its loss is."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.first.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, args: object, result: torch.Tensor) -> None:
        if result.requires_grad:
            result.register_hook(self._spoil)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self._step = global_step
        return super().train_step(global_step, batch, device)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        last = torch.arange(gradient.shape[-1]) == gradient.shape[-1] - 1
        return torch.where(last, torch.inf, gradient) if self._step == 3 else gradient


class Penalized(Classifier):
    """Its loss is of the gradients of its networks."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x = batch[0].requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses([x, *batch[1:]]).sum(), x, create_graph=True)
        if not self.manual_optimization:
            return gradient.square().sum(), batch[2]
        self.optimize(gradient.square().sum(), 0)
        return None


class Stacked(Classifier):
    """Has blocks, in float32."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def losses(self, batch: Any) -> torch.Tensor:
        x = batch[0]
        for block in self.blocks:
            x = x + block(x.to(block.weight.dtype)).to(x.dtype)
        return super().losses([x, *batch[1:]])


class Bare(Stacked):
    """Has a parameter that no ``reset_parameters`` initialises. In float64.

    Attributes:
        elements: How many the largest tensor has that is made until it is asked for data.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.scale = nn.Parameter(torch.ones(12))
        self.double()
        self.most, self.elements = Most(), 0

    def losses(self, batch: Any) -> torch.Tensor:
        return super().losses([batch[0] * self.scale, *batch[1:]])

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.losses(batch).mean(), batch[2]

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        self.elements = self.elements or self.most.elements  # before the first epoch
        return super().get_train_dataloader(sampler, batch_size)

    @classmethod
    def without_data(cls, case: Case) -> Bare:
        """Construct it on the meta device, but for its data."""
        with torch.device("meta"):
            module = cls(case)
        whole = Classifier(case)
        module.x, module.y = whole.x, whole.y
        return module


class Most(TorchDispatchMode):
    """Notes how many elements the largest new tensor on the CPU has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = isinstance(result, torch.Tensor) and func._schema.name.startswith(MAKES)
        if makes and result.device.type == "cpu" and result.is_floating_point():
            self.elements = max(self.elements, local(result).numel())
        return result


MAKES = ("aten::empty", "aten::new_", "aten::clone", "aten::_to_copy", "aten::zeros", "aten::ones")


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
