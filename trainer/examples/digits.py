"""Classify scikit-learn's handwritten digits: ``python -m trainer.examples.digits``.

`Digits.on_end_val_epoch` computes its metrics from the outputs of a whole validation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from events.protocol import RunResult
from trainer import ModuleInterface, Trainer, TrainerArguments, to_device

Images = tuple[torch.Tensor, torch.Tensor]

ARGUMENTS = TrainerArguments(epochs=10, train_batch_size=64, val_batch_size=256, seed=0)
"""Reaches at least 97 % in a few seconds on a CPU."""


class Digits(ModuleInterface):
    """A small convolutional network for images of 8 by 8 pixels; a fifth of them is kept for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.train_set, self.val_set = load_images()
        self.net = nn.Sequential(  # (B, 1, 8, 8)
            nn.Conv2d(1, 32, kernel_size=3, padding=1),  # (B, 32, 8, 8)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),  # (B, 64, 8, 8)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 64, 4, 4)
            nn.Flatten(),  # (B, 1024)
            nn.Dropout(0.3),
            nn.Linear(1024, 10),  # (B, 10)
        )

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int, epochs: int
    ) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        """AdamW, whose learning rate falls to zero along half a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = max(1, estimated_global_steps_per_epoch * epochs)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Images ``(B, 1, 8, 8)`` float32 and labels ``(B,)`` int64, in the run's order."""
        return DataLoader(self.train_set, batch_size=batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
        """The validation images."""
        return DataLoader(self.val_set, batch_size=batch_size, sampler=sampler(self.val_set))

    def train_step(self, global_step: int, batch: Images, device: torch.device | str | int) -> torch.Tensor:
        """The mean cross entropy."""
        images, labels = to_device(batch, device)
        return functional.cross_entropy(self.net(images), labels)

    def val_step(
        self, global_step: int, batch: Images, device: torch.device | str | int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, logits and labels: `on_end_val_epoch` receives each of them collated over the whole validation."""
        images, labels = to_device(batch, device)
        logits = self.net(images)
        return functional.cross_entropy(logits, labels), logits, labels

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Log the accuracy over all images, and that of the worst digit."""
        _, logits, labels = val_step_collated_outputs  # (batches,), (N, 10), (N,), on the host
        confusion = torch.zeros(10, 10).index_put_((labels, logits.argmax(1)), torch.ones(()), accumulate=True)
        correct = confusion.diagonal()  # (10,); row: the digit, column: the prediction
        self.log("accuracy", correct.sum() / confusion.sum())
        self.log("accuracy_worst_digit", (correct / confusion.sum(1)).min())


def load_images() -> tuple[TensorDataset, TensorDataset]:
    """The training and the validation images; every fifth one is for validation.

    Raises:
        ModuleNotFoundError: scikit-learn, which contains the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits are part of scikit-learn, which is not installed; pip install 'stagecast[examples]' (in a"
            " checkout: pip install -e '.[examples]')",
            name=error.name,
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # (1797, 1, 8, 8), 0 to 1
    labels = torch.tensor(digits, dtype=torch.int64)  # (1797,)
    held_back = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~held_back], labels[~held_back]), TensorDataset(images[held_back], labels[held_back])


def main() -> RunResult:
    """Train and print the accuracy."""
    torch.manual_seed(0)
    result = Trainer(Digits(), ARGUMENTS).train()
    metrics = result.metrics
    print(f"validation accuracy {metrics['accuracy']:.1%}; of the worst digit {metrics['accuracy_worst_digit']:.1%}")
    return result


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"digits: {error}")
