"""Classifies scikit-learn's bundled digits; the metrics are computed from a whole validation epoch.

Run it with ``python -m trainer.examples.digits``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from trainer import ModuleInterface, Trainer, TrainerArguments, to_device

ARGUMENTS = TrainerArguments(epochs=15, train_batch_size=64, val_batch_size=256, seed=0, device="cpu")


class Digits(ModuleInterface):
    """A small convolutional network on 8 x 8 images of handwritten digits; every fifth image is for validation."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = _load()
        val = torch.arange(len(images)) % 5 == 0
        self._train_data = TensorDataset(images[~val], labels[~val])
        self._val_data = TensorDataset(images[val], labels[val])
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),  # (B, 64) -> (B, 1, 8, 8)
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 32, 4, 4)
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, 10),
        )

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int, epochs: int
    ) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """AdamW with one cycle of the learning rate over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = estimated_global_steps_per_epoch * epochs
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> DataLoader[Any]:
        """Images ``(B, 64)`` float32 in 0..1 and labels ``(B,)`` int64."""
        data = self._train_data
        return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> DataLoader[Any]:
        """The same, of the images that are kept apart."""
        data = self._val_data
        return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

    def train_step(self, global_step: int, batch: Any, device: torch.device | str | int) -> torch.Tensor:
        """The mean cross entropy."""
        images, labels = to_device(batch, device)
        return functional.cross_entropy(self.net(images), labels)

    def val_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, the logits ``(B, 10)`` and the labels ``(B,)``: what `on_end_val_epoch` gets of the whole epoch."""
        images, labels = to_device(batch, device)
        logits = self.net(images)
        return functional.cross_entropy(logits, labels), logits, labels

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Compute metrics over all rows: accuracy, and the accuracy of the digit that is told worst."""
        _, logits, labels = val_step_collated_outputs  # (steps,), (N, 10), (N,)
        right = logits.argmax(dim=1) == labels  # (N,)
        self.log("accuracy", right.float().mean())
        per_digit = torch.stack([right[labels == digit].float().mean() for digit in range(10)])  # (10,)
        self.log("worst_digit_accuracy", per_digit.min())


def _load() -> tuple[torch.Tensor, torch.Tensor]:
    """All images ``(N, 64)`` float32 in 0..1 with their labels ``(N,)`` int64.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; says what to do.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('this example needs scikit-learn: pip install "stagecast[examples]"') from error
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def main() -> int:
    """Train, and print what the validation says."""
    try:
        module = Digits()
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    result = Trainer(module, ARGUMENTS).train()
    print(f"validation accuracy: {result.metrics['accuracy']:.1%}")
    return 0 if result.status == "finished" else 130


if __name__ == "__main__":
    sys.exit(main())
