"""Learn two moons from ten labels: ``python -m trainer.examples.mean_teacher``.

The teacher, an average of the student's weights, is the target of the second loss (arXiv:1703.01780).
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from trainer import ModuleInterface, Trainer, TrainerArguments, to_device

ARGUMENTS = TrainerArguments(epochs=30, train_batch_size=200, val_batch_size=1_000, seed=0)


class MeanTeacher(ModuleInterface):
    manual_optimization = True  # so that the teacher follows each step of the student that is taken

    def __init__(self, labels: int = 10, decay: float = 0.95, weight: float = 5.0) -> None:
        super().__init__()
        self.decay, self.weight = decay, weight
        angle = torch.linspace(0, torch.pi, 1_000)
        upper = torch.stack([angle.cos(), angle.sin()], 1)  # (N / 2, 2)
        moons, y = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper]), torch.arange(2).repeat_interleave(1_000)
        has_label = torch.arange(2_000) % (2_000 // labels) == 1_000 // labels
        self.data = TensorDataset(moons, y, torch.where(has_label, y, -100))  # the cross entropy ignores -100
        self.student = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)  # in checkpoints, too

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [torch.optim.Adam(self.student.parameters(), lr=0.01)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, _, known = to_device(batch, device)  # (B, 2), (B,), (B,)
        logits = self.student(x + 0.1 * torch.randn_like(x))
        target = self.teacher(x + 0.1 * torch.randn_like(x)).softmax(1)
        supervised = functional.cross_entropy(logits, known, reduction="sum") / (known >= 0).sum().clamp(1)
        consistency = functional.mse_loss(logits.softmax(1), target)
        if self.optimize(supervised + self.weight * min(1.0, global_step / 200) * consistency):
            for mean, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(weight.detach(), 1 - self.decay)
        self.log_dict({"supervised": supervised, "consistency": consistency})
        return supervised.detach()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, y, _ = to_device(batch, device)
        self.log("accuracy", (self.teacher(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"accuracy of the teacher: {Trainer(MeanTeacher(), ARGUMENTS).train().metrics['accuracy']:.1%}")
