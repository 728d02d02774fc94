"""Train a GAN whose samples form a ring: ``python -m trainer.examples.gan``. `train_step` applies its two losses."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import relu
from torch.utils.data import DataLoader, TensorDataset

from trainer import ModuleInterface, Trainer, TrainerArguments, to_device

ARGUMENTS = TrainerArguments(epochs=10, train_batch_size=128, seed=0)


class RingGan(ModuleInterface):
    """The critic learns in every step, the generator in every ``n_critic``-th; both losses are hinge losses."""

    manual_optimization = True

    def __init__(self, n_critic: int = 2) -> None:
        super().__init__()
        angle = 2 * torch.pi * torch.rand(8_192)
        self.ring = TensorDataset(torch.stack([angle.cos(), angle.sin()], 1))  # (N, 2)
        self.n_critic, self.critic, self.generator = n_critic, network(2, 1), network(8, 2)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        both = (self.critic, self.generator)
        return [torch.optim.Adam(one.parameters(), lr=2e-3, betas=(0.5, 0.9)) for one in both], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return DataLoader(self.ring, batch_size, sampler=sampler(self.ring))

    get_val_dataloaders = get_train_dataloader

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        (real,) = to_device(batch, device)  # (B, 2)
        fake = self.samples(real).detach()
        critic_loss = relu(1 - self.critic(real)).mean() + relu(1 + self.critic(fake)).mean()
        self.optimize(critic_loss, optimizer=0)
        if global_step % self.n_critic == 0:
            generator_loss = -self.critic(self.samples(real)).mean()
            self.optimize(generator_loss, optimizer=1)
            self.log("generator_loss", generator_loss)
        return critic_loss.detach()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.log("distance", (self.samples(to_device(batch, device)[0]).norm(dim=1) - 1).abs().mean())

    def samples(self, like: torch.Tensor) -> Any:
        return self.generator(torch.randn(len(like), 8, device=like.device))  # (B, 2)


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"distance of the samples from the ring: {Trainer(RingGan(), ARGUMENTS).train().metrics['distance']:.3f}")
