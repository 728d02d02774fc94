"""Find a batch size and a learning rate, then train with them: ``python -m trainer.examples.find_settings``."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch

from events.protocol import RunResult
from trainer import Trainer, TrainerArguments, find_batch_size, find_learning_rate
from trainer.examples.digits import ARGUMENTS, Digits


class Scheduled(Digits):
    """Digits with a learning rate that can be set, and a schedule that rises to it."""

    lr = 1e-3

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        """AdamW with one cycle over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = max(2, estimated_global_steps_per_epoch * epochs)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)]


def settings_for(module: Scheduled) -> TrainerArguments:
    """Set the learning rate of the module; return arguments whose micro-batch fits in memory."""
    rows = find_batch_size(module, ARGUMENTS, max_size=256, bisect=False)
    arguments = msgspec.structs.replace(ARGUMENTS, gpu_batch_size_limit=rows)
    found = find_learning_rate(module, arguments, low=1e-6, high=1.0)
    try:
        found.plot().savefig("learning_rate.png")
    except ImportError as error:
        print(error, file=sys.stderr)
    module.lr = found.suggestion or module.lr
    return arguments


def main() -> RunResult:
    """Find the settings, train, and print the accuracy."""
    torch.manual_seed(0)
    module = Scheduled()
    arguments = settings_for(module)
    result = Trainer(module, arguments, config={"lr": module.lr}).train()
    print(f"learning rate {module.lr:.2g}, validation accuracy {result.metrics['accuracy']:.1%}")
    return result


if __name__ == "__main__":
    main()
